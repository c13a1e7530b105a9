"""A client of the service for other Python programs: publishes images and requests, and waits for what becomes of them.

Synchronous and for one thread; any number of images and requests may be outstanding. Anything that can write to Kafka
does the same without it: the contract is `protocols`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import structlog
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from protocols.dead_letters import DeadLetter
from protocols.encoding import CONTENT_TYPE_HEADER, JSON, MSGPACK, content_type_of, decode, encode
from protocols.events import Event, ImageIndexed, ImageNew, RerankRequest, RerankResponse
from protocols.topics import Topics
from workers.bus.producer import KafkaOutbox
from workers.bus.reader import KafkaReader
from workers.errors import WorkerError
from workers.ports import Headers, Outbox, Outgoing, Record
from workers.telemetry import names
from workers.telemetry.trace_context import trace_id_of

log = structlog.get_logger(__name__)

EventT = TypeVar("EventT", bound=Event)

MAX_MESSAGE_BYTES = 1 << 20
CLOSE_TIMEOUT_S = 10.0
PUBLISH_TIMEOUT_S = 60.0
#: How long one wait for messages lasts at most: an interrupt is noticed in between.
POLL_S = 0.5


class NoAnswer(WorkerError):
    """The service has not answered in time; the message says what was waited for."""


class Reader(Protocol):
    """Reads some topics from where they ended when it was made."""

    def poll(self, timeout_s: float) -> list[Record]:
        """Return what has arrived, waiting at most this long for the first record."""
        ...

    def unknown_topics(self) -> list[str]:
        """The topics that have not been seen to exist."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """A response and the trace in which it was made."""

    response: RerankResponse
    trace_id: str | None


class Client:
    """Publishes events and matches what comes back with them, by id."""

    def __init__(self, outbox: Outbox, reader: Reader, topics: Topics) -> None:
        """`reader` reads `answer_topics`, and any other topic to which replies are directed."""
        self._outbox = outbox
        self._reader = reader
        self._topics = topics
        self._requests: set[str] = set()
        self._images: set[str] = set()
        self._replies: dict[str, Reply] = {}
        self._outcomes: list[ImageIndexed | DeadLetter] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._outbox.close(CLOSE_TIMEOUT_S)
        self._reader.close()

    def publish_image(self, image: ImageNew, *, watch: bool = True) -> Future[None]:
        """Publish an image; with `watch`, `image_outcomes` will tell what became of it."""
        if watch:
            self._images.add(image.image_id)
        # JSON would make a third more of the bytes.
        content_type = JSON if image.data is None else MSGPACK
        return self._publish(self._topics.images_new, image.image_id, image, content_type)

    def image_outcomes(self, timeout_s: float) -> list[ImageIndexed | DeadLetter]:
        """What became of watched images since the last call, waiting at most this long for the first."""
        self._receive_until(lambda: bool(self._outcomes), timeout_s)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def forget_image(self, image_id: str) -> None:
        """Watch an image no longer, because it was never published."""
        self._images.discard(image_id)

    @property
    def outstanding_images(self) -> frozenset[str]:
        """The watched images of which nothing has been heard yet."""
        return frozenset(self._images)

    def publish_request(self, request: RerankRequest) -> Future[None]:
        """Publish a request whose reply `reply_to` will return."""
        self._requests.add(request.request_id)
        return self._publish(self._topics.rerank_requests, request.request_id, request, JSON)

    def reply_to(self, request_id: str, timeout_s: float) -> Reply:
        """Return the reply to a published request. Raises `NoAnswer`; the reply can still be waited for then."""
        if not self._receive_until(lambda: request_id in self._replies, timeout_s):
            raise NoAnswer(f"no reply to request {request_id} within {timeout_s:g} s; {self._why_silent()}")
        return self._replies.pop(request_id)

    def rerank(self, request: RerankRequest, timeout_s: float) -> Reply:
        """Publish a request and return its reply. Raises `NoAnswer`, or what publishing raises."""
        published = self.publish_request(request)
        try:
            published.result(PUBLISH_TIMEOUT_S)
        except TimeoutError:
            raise NoAnswer(f"Kafka has not taken request {request.request_id} within {PUBLISH_TIMEOUT_S:g} s") from None
        return self.reply_to(request.request_id, timeout_s)

    def _publish(self, topic: str, event_id: str, event: Event, content_type: str) -> Future[None]:
        # A span of the program's own tracing, where it has set any up; else nothing is recorded, no header is written
        # and the worker begins the trace.
        attributes = {
            names.SYSTEM.name: "kafka",
            names.OPERATION.name: "send",
            names.OPERATION_TYPE.name: "send",
            names.TOPIC.name: topic,
            names.CONVERSATION.name: event_id,
        }
        tracer = trace.get_tracer("edje.client")
        with tracer.start_as_current_span(f"send {topic}", kind=trace.SpanKind.PRODUCER, attributes=attributes):
            headers = ((CONTENT_TYPE_HEADER, content_type.encode()), *_trace_headers())
            return self._outbox.send(Outgoing(topic, event_id.encode(), encode(event, content_type), headers))

    def _receive_until(self, has_come: Callable[[], bool], timeout_s: float) -> bool:
        give_up_at = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, give_up_at - time.monotonic())
            for record in self._reader.poll(0.0 if has_come() else min(left_s, POLL_S)):
                self._receive(record)
            if has_come():
                return True
            if time.monotonic() >= give_up_at:
                return False

    def _receive(self, record: Record) -> None:
        try:
            if record.partition.topic == self._topics.images_indexed:
                self._note_outcome(_decoded(ImageIndexed, record))
            elif record.partition.topic == self._topics.dead_letter(self._topics.images_new):
                self._note_dead_image(record)
            else:
                self._note_reply(_decoded(RerankResponse, record), record.headers)
        except ValueError as error:  # another producer's mistake; it answers nothing of ours
            log.warning(
                "an answer cannot be read", topic=record.partition.topic, offset=record.offset, error=str(error)
            )

    def _note_outcome(self, indexed: ImageIndexed) -> None:
        if indexed.image_id in self._images:
            self._images.discard(indexed.image_id)
            self._outcomes.append(indexed)

    def _note_dead_image(self, record: Record) -> None:
        letter = DeadLetter.from_message(record.key, record.value, record.headers)
        image_id = (record.key or b"").decode("utf-8", "replace")
        if image_id in self._images:
            self._images.discard(image_id)
            self._outcomes.append(letter)

    def _note_reply(self, response: RerankResponse, headers: Headers) -> None:
        # Delivered at least once: the second reply to a request finds it gone from the set.
        if response.request_id in self._requests:
            self._requests.discard(response.request_id)
            self._replies[response.request_id] = Reply(response, trace_id_of(headers))

    def _why_silent(self) -> str:
        unknown = self._reader.unknown_topics()
        if unknown:
            return f"the topic {unknown[0]} does not exist: is the worker running, with this topic prefix?"
        return "is the worker running and ready, with this topic prefix?"


def answer_topics(topics: Topics) -> list[str]:
    """Where the service answers."""
    return [topics.images_indexed, topics.dead_letter(topics.images_new), topics.rerank_responses]


def connect(
    connection: Mapping[str, Any],
    topics: Topics,
    *,
    read: Sequence[str] | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> Client:
    """A client on Kafka; `connection` is what every client of this broker needs. Raises `WorkerError`.

    It reads all `answer_topics`, unless told which of them, or which other reply topic, it needs.
    """
    reader = KafkaReader(connection, read or answer_topics(topics), max_message_bytes=max_message_bytes)
    try:
        return Client(KafkaOutbox(connection, max_message_bytes=max_message_bytes), reader, topics)
    except BaseException:
        reader.close()
        raise


def _decoded(kind: type[EventT], record: Record) -> EventT:
    return decode(kind, record.value or b"", content_type_of(record.headers))


def _trace_headers() -> Headers:
    """The caller's trace where it is in one."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple((name, value.encode()) for name, value in carrier.items())

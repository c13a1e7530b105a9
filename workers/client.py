"""A client of the service for Python programs: publishes images and requests, and waits for their outcomes.

    from protocols.events import Query, RerankRequest
    from workers.client import connect

    with connect("localhost:9092") as client:
        candidates = [{"image_id": "img-7"}, {"image_id": "img-2", "score": 0.3}]
        request = RerankRequest(request_id="r-1", query=Query(text="a dog on a beach"), candidates=candidates)
        reply = client.rerank(request, timeout_s=10.0)
        for result in reply.response.results:
            print(result.id, result.relevance_score)

Synchronous and for one thread. Any number of images and up to `MAX_OUTSTANDING` requests may be outstanding. Any
program that can write to Kafka can do the same without this client: the contract is `protocols`.
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
#: Requests that a client waits for, and replies that it keeps; the oldest is forgotten to make room for another.
MAX_OUTSTANDING = 10_000
#: The longest single wait for messages: an interrupt is noticed between two waits.
POLL_S = 0.5


class NoAnswer(WorkerError):
    """The service has not answered in time; the error names the request and the timeout."""


class Reader(Protocol):
    """Reads the records published to some topics after the reader was made."""

    def poll(self, timeout_s: float) -> list[Record]:
        """Return the records that have arrived, waiting at most this long for the first one."""
        ...

    def unknown_topics(self) -> list[str]:
        """Return the topics that have not been found."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """A response and the id of its trace."""

    response: RerankResponse
    trace_id: str | None


@dataclass(frozen=True, slots=True)
class Removed:
    """The outcome of a removal: the image is no longer in the store."""

    image_id: str


ImageOutcome = ImageIndexed | Removed | DeadLetter


class Client:
    """Publishes events and matches the answers to them by id."""

    def __init__(self, outbox: Outbox, reader: Reader, topics: Topics) -> None:
        """`reader` reads `answer_topics` and any other reply topic that requests name."""
        self._outbox = outbox
        self._reader = reader
        self._topics = topics
        self._requests: dict[str, None] = {}  # the oldest first
        self._images: set[str] = set()
        self._replies: dict[str, Reply] = {}
        self._outcomes: list[ImageOutcome] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._outbox.close(CLOSE_TIMEOUT_S)
        self._reader.close()

    def publish_image(self, image: ImageNew, *, watch: bool = True) -> Future[None]:
        """Publish an image; with `watch`, `image_outcomes` will return its outcome."""
        if watch:
            self._images.add(image.image_id)
        # JSON would enlarge the bytes by a third.
        content_type = JSON if image.data is None else MSGPACK
        value = encode(image, content_type)
        return self._publish(self._topics.images_new, image.image_id, value, content_type)

    def publish_removal(self, image_id: str, *, watch: bool = True) -> Future[None]:
        """Publish the removal of an image; with `watch`, `image_outcomes` will return its outcome."""
        if watch:
            self._images.add(image_id)
        return self._publish(self._topics.images_new, image_id, None, None)

    def image_outcomes(self, timeout_s: float) -> list[ImageOutcome]:
        """Return the outcomes of watched images since the last call, waiting at most this long for the first one."""
        self._receive_until(lambda: bool(self._outcomes), timeout_s)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def forget_image(self, image_id: str) -> None:
        """Stop watching an image, because it was never published."""
        self._images.discard(image_id)

    def watch_image(self, image_id: str) -> None:
        """Watch an image that was published before."""
        self._images.add(image_id)

    def watches(self, image_id: str) -> bool:
        """Whether an image is watched and has no outcome yet."""
        return image_id in self._images

    @property
    def num_outstanding_images(self) -> int:
        """The number of watched images without an outcome."""
        return len(self._images)

    @property
    def outstanding_images(self) -> frozenset[str]:
        """The watched images without an outcome."""
        return frozenset(self._images)

    def publish_request(self, request: RerankRequest) -> Future[None]:
        """Publish a request; `reply_to` waits for its reply."""
        _bound(self._requests)
        self._requests[request.request_id] = None
        value = encode(request, JSON)
        return self._publish(self._topics.rerank_requests, request.request_id, value, JSON)

    def reply_to(self, request_id: str, timeout_s: float) -> Reply:
        """Return the reply to a published request. Raises `NoAnswer`; another call may still return the reply."""
        if not self._receive_until(lambda: request_id in self._replies, timeout_s):
            raise NoAnswer(f"no reply to request {request_id} within {timeout_s:g} s; {self._why_silent()}")
        return self._replies.pop(request_id)

    def forget_request(self, request_id: str) -> None:
        """Stop waiting for the reply to a request."""
        self._requests.pop(request_id, None)
        self._replies.pop(request_id, None)

    def rerank(self, request: RerankRequest, timeout_s: float) -> Reply:
        """Publish a request and return its reply. Raises `NoAnswer`, or the error of publishing."""
        published = self.publish_request(request)
        try:
            published.result(PUBLISH_TIMEOUT_S)
            return self.reply_to(request.request_id, timeout_s)
        except TimeoutError:
            raise NoAnswer(
                f"Kafka has not accepted request {request.request_id} within {PUBLISH_TIMEOUT_S:g} s"
            ) from None
        finally:
            self.forget_request(request.request_id)

    def _publish(self, topic: str, event_id: str, value: bytes | None, content_type: str | None) -> Future[None]:
        # A span of the calling program's tracing, if it has any; else nothing is recorded, no header is written and the
        # worker begins the trace.
        attributes = {
            names.SYSTEM.name: "kafka",
            names.OPERATION.name: "send",
            names.OPERATION_TYPE.name: "send",
            names.TOPIC.name: topic,
            names.CONVERSATION.name: event_id,
        }
        tracer = trace.get_tracer("edje.client")
        with tracer.start_as_current_span(f"send {topic}", kind=trace.SpanKind.PRODUCER, attributes=attributes):
            content = () if content_type is None else ((CONTENT_TYPE_HEADER, content_type.encode()),)
            return self._outbox.send(Outgoing(topic, event_id.encode(), value, (*content, *_trace_headers())))

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
                self._note_image(record)
            elif record.partition.topic == self._topics.dead_letter(self._topics.images_new):
                self._note_dead_image(record)
            else:
                self._note_reply(_decoded(RerankResponse, record), record.headers)
        except ValueError as error:  # from another producer; it answers no request of this client
            log.warning(
                "an answer cannot be decoded", topic=record.partition.topic, offset=record.offset, error=str(error)
            )

    def _note_image(self, record: Record) -> None:
        outcome: ImageOutcome
        if record.value is None:
            outcome = Removed((record.key or b"").decode("utf-8", "replace"))
        else:
            outcome = _decoded(ImageIndexed, record)
        self._note_outcome(outcome.image_id, outcome)

    def _note_dead_image(self, record: Record) -> None:
        letter = DeadLetter.from_message(record.key, record.value, record.headers)
        self._note_outcome((record.key or b"").decode("utf-8", "replace"), letter)

    def _note_outcome(self, image_id: str, outcome: ImageOutcome) -> None:
        if image_id in self._images:
            self._images.discard(image_id)
            self._outcomes.append(outcome)

    def _note_reply(self, response: RerankResponse, headers: Headers) -> None:
        # Replies are delivered at least once: a second reply to a request finds no open request and is ignored.
        if response.request_id in self._requests:
            del self._requests[response.request_id]
            _bound(self._replies)
            self._replies[response.request_id] = Reply(response, trace_id_of(headers))

    def _why_silent(self) -> str:
        unknown = self._reader.unknown_topics()
        if unknown:
            return f"the topic {unknown[0]} does not exist: is the worker running, with this topic prefix?"
        return "is the worker running and ready, with this topic prefix?"


def answer_topics(topics: Topics) -> list[str]:
    """Return the topics on which the service answers."""
    return [topics.images_indexed, topics.dead_letter(topics.images_new), topics.rerank_responses]


def connect(
    connection: str | Mapping[str, Any],
    topics: Topics = Topics(),  # noqa: B008  # immutable
    *,
    read: Sequence[str] | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> Client:
    """Return a client on Kafka. Raises `WorkerError`.

    `connection` holds the addresses of brokers, separated by commas, or the keyword arguments that every client of
    kafka-python needs for these brokers (`bootstrap_servers`, `security_protocol`…). The client reads all
    `answer_topics`, or the topics of `read`: some of them, and other reply topics.
    """
    options = {"bootstrap_servers": connection.split(",")} if isinstance(connection, str) else connection
    reader = KafkaReader(options, read or answer_topics(topics), max_message_bytes=max_message_bytes)
    try:
        return Client(KafkaOutbox(options, max_message_bytes=max_message_bytes), reader, topics)
    except BaseException:
        reader.close()
        raise


def _bound(oldest_first: dict[str, Any]) -> None:
    """Remove the oldest entries to make room for one more."""
    while len(oldest_first) >= MAX_OUTSTANDING:
        del oldest_first[next(iter(oldest_first))]


def _decoded(kind: type[EventT], record: Record) -> EventT:
    return decode(kind, record.value, content_type_of(record.headers))


def _trace_headers() -> Headers:
    """Return the headers of the caller's trace, if it has one."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple((name, value.encode()) for name, value in carrier.items())

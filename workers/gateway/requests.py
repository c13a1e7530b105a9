"""Sends rerank requests over Kafka and waits for their replies, from asyncio.

Each replica reads one partition of the reply topic without a group, so no rebalance moves the partition and no
replica reads another's replies. Every wait has a timeout. Used from the event loop's thread only, which the
follower's thread wakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import structlog

from protocols.encoding import CANCEL_HEADER, CONTENT_TYPE_HEADER, JSON, EventError, content_type_of, decode, encode
from protocols.events import RerankRequest, RerankResponse
from workers.errors import Refused, WorkerError
from workers.gateway.errors import ApiError, Unanswered
from workers.gateway.pending import PendingReplies
from workers.metrics import Metrics
from workers.ports import Follower, Gap, Headers, Interval, Outbox, Outgoing, Record, SpanIds

log = structlog.get_logger(__name__)

#: Most bytes of unacknowledged requests. Beyond this the producer's buffer could fill, and sending would
#: block the event loop.
MAX_UNSENT_BYTES = 16 << 20


class Sent(Protocol):
    """Records the span of sending a message (`BusSpans.sent`)."""

    def __call__(self, message: Outgoing, interval: Interval, error: BaseException | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to a request."""

    response: RerankResponse
    headers: Headers


class RerankRequests:
    """The open requests of one replica of the gateway."""

    def __init__(
        self,
        *,
        request_topic: str,
        metrics: Metrics,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        sent: Sent,
    ) -> None:
        self._topic = request_topic
        self._metrics = metrics
        self._clock = clock
        self.loop = loop
        self._sent = sent
        self._pending: PendingReplies[asyncio.Future[Reply]] = PendingReplies()
        self._num_unsent_bytes = 0
        #: Outbox and follower are set when Kafka is connected; until then requests raise `Unanswered`.
        self.outbox: Outbox | None = None
        self.follower: Follower | None = None
        #: Ends with the error of the follower's thread, after which the process has to end.
        self.failed: asyncio.Future[None] = loop.create_future()

    def wake(self) -> None:
        """Schedule reading the replies that have arrived; called on the follower's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the process ends
            self.loop.call_soon_threadsafe(self._receive)

    def num_open(self) -> int:
        return len(self._pending)

    async def ask(
        self,
        request: RerankRequest,
        *,
        timeout_s: float,
        trace_headers: Headers,
        span: SpanIds | None,
    ) -> Reply:
        """Send a request and return its reply. Raises `Unanswered`, or `ApiError` for an id that is in use.

        If the caller is cancelled, and no other caller waits for the same request, the request is cancelled.
        """
        content = encode(request.model_copy(update={"deadline": None}))
        fingerprint = hashlib.sha256(content).digest()
        waiter, is_new = self._pending.join(request.request_id, fingerprint, self.loop.create_future, self._clock())
        is_cancelled = False
        try:
            if is_new:
                self._send(request, trace_headers, span)
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(waiter)
        except TimeoutError:
            raise Unanswered(
                504, "timeout", f"no reply within {timeout_s:.3g} s; the rerank workers are overloaded or not running"
            ) from None
        except asyncio.CancelledError:
            is_cancelled = True
            self._metrics.gateway_cancelled.inc()
            raise
        finally:
            was_last = self._pending.leave(request.request_id, self._clock())
            if is_cancelled and was_last:
                self._cancel(request.request_id)

    def _send(self, request: RerankRequest, trace_headers: Headers, span: SpanIds | None) -> None:
        value = encode(request)
        if self.outbox is None or self._num_unsent_bytes + len(value) > MAX_UNSENT_BYTES:
            self._fail(request.request_id, Unanswered(503, "kafka_away", "Kafka does not take requests at the moment"))
            return
        headers = ((CONTENT_TYPE_HEADER, JSON.encode()), *trace_headers)
        message = Outgoing(self._topic, request.request_id.encode(), value, headers, span=span)
        started_at = self._clock()
        self._num_unsent_bytes += len(value)
        sent = self.outbox.send(message)
        # Runs on the producer's thread.
        sent.add_done_callback(
            lambda sent: self._on_loop(lambda: self._on_sent(request.request_id, message, started_at, sent))
        )

    def _cancel(self, request_id: str) -> None:
        """Cancel a request: a worker that has not started it does not score it."""
        if self.outbox is None:
            return
        message = Outgoing(self._topic, request_id.encode(), None, ((CANCEL_HEADER, b"1"),))
        self.outbox.send(message).add_done_callback(
            lambda sent: sent.exception()  # retrieves the error: scoring a cancelled request is harmless
        )

    def _on_loop(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: no caller waits
            self.loop.call_soon_threadsafe(call)

    def _on_sent(self, request_id: str, message: Outgoing, started_at: float, sent: Future[None]) -> None:
        self._num_unsent_bytes -= len(message.value or b"")
        error = sent.exception()
        self._sent(message, Interval(started_at, self._clock()), error)
        if error is None:
            return
        if isinstance(error, Refused) and error.code == "too_large":
            self._fail(request_id, ApiError(413, "request_too_large", f"the request is too large for Kafka: {error}"))
        elif isinstance(error, WorkerError):
            log.warning("request not sent", request_id=request_id, error=str(error))
            self._fail(request_id, Unanswered(503, "kafka_away", "Kafka does not take requests at the moment"))
        else:
            self.failed.set_exception(error)

    def _fail(self, request_id: str, error: ApiError | Unanswered) -> None:
        waiter = self._pending.close(request_id, self._clock())
        if isinstance(waiter, asyncio.Future) and not waiter.done():
            waiter.set_exception(error)
            waiter.exception()  # retrieved here too, because the caller may have left

    def _receive(self) -> None:
        """Pass every reply that has arrived to its callers."""
        assert self.follower is not None
        try:
            while (taken := self.follower.take()) is not None:
                if isinstance(taken, Gap):
                    log.warning("replies may be missing", partition=taken.partition.number, reason=taken.reason)
                else:
                    self._receive_record(taken)
        except Exception as error:
            if not self.failed.done():
                self.failed.set_exception(error)

    def _receive_record(self, record: Record) -> None:
        try:
            response = decode(RerankResponse, record.value or b"", content_type_of(record.headers))
        except EventError as error:
            self._metrics.gateway_replies["invalid"].inc()
            log.warning("a reply cannot be read", offset=record.offset, error=str(error))
            return
        waiter = self._pending.close(response.request_id, self._clock())
        if isinstance(waiter, str):
            self._metrics.gateway_replies[waiter].inc()
            return
        self._metrics.gateway_replies["matched"].inc()
        if not waiter.done():
            waiter.set_result(Reply(response, record.headers))

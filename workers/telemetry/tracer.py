"""Decides which messages are traced, and makes spans from times that a worker measures anyway.

Spans are built when they have ended, with explicit times; there is no "current" span, because the loop works on many
messages at once. A message that is not sampled costs only the reading of its headers. Used from the loop's thread only.
Knows nothing of the destinations of spans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from workers.ports import Headers, Interval, SpanIds
from workers.telemetry.finished_span import FinishedSpan
from workers.telemetry.names import SpanName
from workers.telemetry.sampling import Sampling
from workers.telemetry.trace_context import (
    SAMPLED,
    TraceContext,
    context_headers,
    names_context,
    new_context,
    new_id,
    read_context,
)

Attributes = Mapping[str, Any]


class MessageTrace(NamedTuple):
    """The trace of a consumed message; `span` is set only if its processing is recorded."""

    context: TraceContext  # for the messages that answer it
    span: SpanIds | None = None

    @property
    def trace_id(self) -> str:
        return self.context.trace_id.decode()

    def exemplar(self) -> dict[str, str] | None:
        """Return the label that links a measurement to the trace, None if it is not sampled."""
        return None if self.span is None else {"trace_id": self.trace_id}

    def outgoing(self) -> tuple[Headers, SpanIds | None]:
        """Return the trace headers of a message that answers this one, and the ids of the span of its sending."""
        if self.span is None:
            return context_headers(self.context), None
        sent = SpanIds(self.span.trace_id, new_id(64), self.span.span_id)
        return context_headers(self.context._replace(span_id=b"%016x" % sent.span_id)), sent


class Tracer:
    """Passes finished spans to `emit`; `Tracer.off()` records none and passes every context on unchanged."""

    def __init__(
        self,
        *,
        sampling: Sampling | None,
        emit: Callable[[FinishedSpan], None],
        clock: Callable[[], float],
        wall_ns: Callable[[], int],
        count_bad_context: Callable[[], None],
    ) -> None:
        """All times are seconds of `clock`, the loop's clock; `wall_ns` returns nanoseconds since 1970."""
        self._sampling = sampling
        self._emit = emit
        self._clock = clock
        self._wall_ns = wall_ns
        self._count_bad_context = count_bad_context
        self.synchronise()

    @classmethod
    def off(cls, count_bad_context: Callable[[], None] = lambda: None) -> Tracer:
        """Return a tracer that records nothing."""
        return cls(
            sampling=None,
            emit=lambda span: None,
            clock=lambda: 0.0,
            wall_ns=lambda: 0,
            count_bad_context=count_bad_context,
        )

    def synchronise(self) -> None:
        """Read both clocks again, because the wall clock may have been set."""
        self._epoch_ns = self._wall_ns() - round(self._clock() * 1e9)

    def begin(self, headers: Headers) -> MessageTrace:
        """Return the trace of a message that has arrived, and decide whether it is recorded."""
        parent = read_context(headers)
        if parent is None and names_context(headers):
            self._count_bad_context()
        if self._sampling is None:
            return MessageTrace(parent or new_context())
        if parent is None:
            number, parent_is_sampled = new_id(128), None
            trace_id, flags, state = b"%032x" % number, 0, b""
        else:
            number, parent_is_sampled = int(parent.trace_id, 16), parent.is_sampled
            trace_id, flags, state = parent.trace_id, parent.flags, parent.state
        span_id = new_id(64)
        if not self._sampling.takes(number, parent_is_sampled=parent_is_sampled):
            return MessageTrace(TraceContext(trace_id, b"%016x" % span_id, flags & ~SAMPLED, state))
        parent_id = None if parent is None else int(parent.span_id, 16)
        context = TraceContext(trace_id, b"%016x" % span_id, flags | SAMPLED, state)
        return MessageTrace(context, SpanIds(number, span_id, parent_id))

    def record(
        self,
        what: SpanName,
        ids: SpanIds,
        interval: Interval,
        attributes: Attributes,
        *,
        of: str = "",
        state: bytes = b"",
        links: Sequence[SpanIds] = (),
        failed: bool = False,
    ) -> None:
        """Emit a span; `of` completes its name, `failed` marks it as an error."""
        # The links are copied, because the caller may change its list while another thread exports the span.
        started_ns = self._epoch_ns + round(interval.started_at * 1e9)
        ended_ns = self._epoch_ns + round(interval.ended_at * 1e9)
        self._emit(FinishedSpan(what, of, ids, started_ns, ended_ns, attributes, tuple(links), state, failed))


def child_of(parent: SpanIds) -> SpanIds:
    """Return the ids of a new child span."""
    return SpanIds(parent.trace_id, new_id(64), parent.span_id)


def root() -> SpanIds:
    """Return the ids of a span that begins a trace, for work that belongs to no single message."""
    return SpanIds(new_id(128), new_id(64), None)

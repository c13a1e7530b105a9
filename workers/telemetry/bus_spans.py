"""Records spans of bus operations (poll, process, send, commit) by OpenTelemetry's messaging conventions.

Polls and commits concern many messages, so their spans belong to no message's trace and link to each sampled
message. Used from the loop's thread only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.ports import Interval, Outgoing, Poll, Record, SpanIds
from workers.telemetry import names
from workers.telemetry.tracer import MessageTrace, Tracer, child_of, root

_KAFKA = {names.SYSTEM.name: "kafka"}


def _operation(name: str, kind: str) -> dict[str, str]:
    return {**_KAFKA, names.OPERATION.name: name, names.OPERATION_TYPE.name: kind}


_PROCESS, _POLL = _operation("process", "process"), _operation("poll", "receive")
_SEND, _COMMIT = _operation("send", "send"), _operation("commit", "settle")


class BusSpans:
    """Records the bus spans of one worker."""

    def __init__(self, tracer: Tracer, *, topic: str, group_id: str) -> None:
        """`topic` is the consumed topic."""
        self._tracer = tracer
        self._topic = topic
        self._consumes = {names.TOPIC.name: topic, names.GROUP.name: group_id}
        self._poll: Poll | None = None
        self._polled: list[SpanIds] = []  # producers' spans of the last poll's sampled records

    @classmethod
    def off(cls) -> BusSpans:
        """Records nothing."""
        return cls(Tracer.off(), topic="", group_id="")

    def begin(self, record: Record) -> MessageTrace:
        """Return the trace of a record that has been taken."""
        trace = self._tracer.begin(record.headers)
        if trace.span is not None and record.poll is not None:
            if record.poll is not self._poll:
                self.flush()
                self._poll = record.poll
            # The producer's span, or this worker's if the trace begins here.
            self._polled.append(SpanIds(trace.span.trace_id, trace.span.parent_id or trace.span.span_id, None))
        return trace

    def flush(self) -> None:
        """Record the last poll; call this when no more of its records will be taken."""
        poll, self._poll = self._poll, None
        polled, self._polled = self._polled, []
        if poll is not None:
            attributes = {**_POLL, **self._consumes, names.MESSAGES.name: poll.num_records}
            self._tracer.record(names.POLL, root(), poll.interval, attributes, of=self._topic, links=polled)

    def processed(
        self,
        record: Record,
        trace: MessageTrace,
        span: SpanIds,
        interval: Interval,
        *,
        status: str,
        event_id: str | None,
        error: str | None,
        links: Sequence[SpanIds] = (),
        attributes: Mapping[str, Any],
    ) -> None:
        """Record the processing of one record up to its outcome; `attributes` come from the job."""
        recorded = {
            **_PROCESS,
            **self._consumes,
            names.PARTITION.name: str(record.partition.number),
            names.OFFSET.name: record.offset,
            names.STATUS.name: status,
            **attributes,
        }
        if event_id is not None:
            recorded[names.CONVERSATION.name] = event_id
        if error is not None:
            recorded[names.ERROR_TYPE.name] = error
        state = trace.context.state
        self._tracer.record(
            names.PROCESS, span, interval, recorded, of=self._topic, state=state, links=links, failed=error is not None
        )

    def stages(self, span: SpanIds, stages: Mapping[str, Interval]) -> None:
        """Record the stages of one record as children of its processing; stages of zero length are left out."""
        for stage, interval in stages.items():
            if interval.ended_at > interval.started_at:
                self._tracer.record(names.STAGE, child_of(span), interval, {}, of=stage)

    def sent(self, message: Outgoing, interval: Interval, error: BaseException | None = None) -> None:
        """Record the sending of a message, if it is sampled."""
        if message.span is None:
            return
        attributes: dict[str, Any] = {**_SEND, names.TOPIC.name: message.topic}
        if message.key is not None:
            attributes[names.CONVERSATION.name] = message.key.decode("utf-8", "replace")
        if error is not None:
            attributes[names.ERROR_TYPE.name] = type(error).__name__
        failed = error is not None
        self._tracer.record(names.SEND, message.span, interval, attributes, of=message.topic, failed=failed)

    def committed(self, settled: Sequence[SpanIds], num_events: int, interval: Interval) -> None:
        """Record a commit or transaction; `settled` are the spans of its sampled events."""
        if settled:
            attributes = {**_COMMIT, **self._consumes, names.MESSAGES.name: num_events}
            self._tracer.record(names.COMMIT, root(), interval, attributes, of=self._topic, links=settled)

    def refresh(self) -> None:
        """Record the last poll and synchronise the clocks; to be called at an interval."""
        self.flush()
        self._tracer.synchronise()

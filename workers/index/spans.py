"""Records the spans of the index worker: the processing of each event, and the writes that events share."""

from __future__ import annotations

from collections.abc import Sequence

from workers.ports import Interval, Record, SpanIds
from workers.telemetry import names
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.tracer import MessageTrace, Tracer, root


class IndexSpans:
    """The spans of one index worker."""

    def __init__(self, tracer: Tracer, bus: BusSpans) -> None:
        self._tracer = tracer
        self.bus = bus

    @classmethod
    def off(cls) -> IndexSpans:
        """Records nothing."""
        return cls(Tracer.off(), BusSpans.off())

    def ended(
        self,
        record: Record,
        trace: MessageTrace,
        image_id: str | None,
        taken_at: float,
        now: float,
        status: str,
        error: str | None = None,
    ) -> None:
        """Record the processing of an event with its outcome."""
        span = trace.span
        if span is None:
            return
        polled_at = record.polled_at(taken_at)
        self.bus.processed(
            record,
            trace,
            span,
            Interval(polled_at, now),
            status=status,
            event_id=image_id,
            error=error,
            attributes={},
        )
        stages = {names.INBOX: Interval(polled_at, taken_at), names.INDEX_STAGE: Interval(taken_at, now)}
        self.bus.stages(span, stages)

    def written(self, events: Sequence[SpanIds], num_rows: int, interval: Interval) -> None:
        """Record a write if one of its events is sampled."""
        if events:
            attributes = {names.DB_SYSTEM.name: "postgresql", names.DB_BATCH.name: num_rows}
            self._tracer.record(names.INDEX_WRITE, root(), interval, attributes, links=events)

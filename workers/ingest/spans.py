"""Records the spans of image events: the processing and its stages, and shared look-ups, batches and writes.

A span is made when its work has ended, from times that the stages keep anyway; an unsampled event costs
one comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.ingest.work import ImageWork
from workers.ports import Interval, Record, SpanIds
from workers.telemetry import names
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.tracer import MessageTrace, Tracer, child_of, root

#: Most images that a batch's span lists; few batches are larger.
MAX_NAMED_IMAGES = 100


class IngestSpans:
    """The spans of one ingest worker."""

    def __init__(self, tracer: Tracer, bus: BusSpans) -> None:
        self._tracer = tracer
        self.bus = bus

    @classmethod
    def off(cls) -> IngestSpans:
        """Return spans that record nothing."""
        return cls(Tracer.off(), BusSpans.off())

    def ended(self, image: ImageWork, now: float, status: str, error: str | None = None) -> None:
        """Record the processing of an event with its outcome."""
        span = image.trace.span
        if span is None:
            return
        polled_at = image.record.polled_at(image.taken_at)
        self.bus.processed(
            image.record,
            image.trace,
            span,
            Interval(polled_at, now),
            status=status,
            event_id=image.image_id,
            error=error,
            links=image.batches,
            attributes={},
        )
        self.bus.stages(span, {names.INBOX: Interval(polled_at, image.taken_at), **image.stages})

    def unreadable(self, record: Record, trace: MessageTrace, image_id: str | None, now: float, *, error: str) -> None:
        """Record the processing of a record that is no valid event."""
        if trace.span is not None:
            self.bus.processed(
                record,
                trace,
                trace.span,
                Interval(record.polled_at(now), now),
                status="dead_letter",
                event_id=image_id,
                error=error,
                attributes={},
            )

    def looked_up(self, images: Sequence[ImageWork], interval: Interval, num_bytes: int) -> None:
        """Record a look-up under the first sampled image, linked to the others."""
        recorded = _recorded(images)
        if recorded:
            attributes = {
                names.DB_SYSTEM.name: "redis",
                names.DB_OPERATION.name: names.READ.name,
                names.DB_BATCH.name: len(images),
                names.READ_BYTES.name: num_bytes,
            }
            self._tracer.record(names.READ, child_of(recorded[0]), interval, attributes, links=recorded[1:])

    def encoded(self, images: Sequence[ImageWork], interval: Interval) -> SpanIds | None:
        """Record a batch on the engine if one of its images is sampled; returns its ids."""
        recorded = _recorded(images)
        if not recorded:
            return None
        ids = root()
        for image in images:
            if image.trace.span is not None:
                image.batches.append(ids)
        attributes = {
            names.IMAGES.name: len(images),
            names.IMAGE_IDS.name: tuple(image.image_id for image in images[:MAX_NAMED_IMAGES]),
        }
        self._tracer.record(names.ENCODE_BATCH, ids, interval, attributes, links=recorded)
        return ids

    def written(self, batch: SpanIds | None, interval: Interval, num_blobs: int) -> None:
        """Record the write of a batch, if the batch is sampled."""
        if batch is not None:
            attributes = {
                names.DB_SYSTEM.name: "redis",
                names.DB_OPERATION.name: names.WRITE.name,
                names.DB_BATCH.name: num_blobs,
            }
            self._tracer.record(names.WRITE, child_of(batch), interval, attributes)


def _recorded(images: Sequence[ImageWork]) -> list[SpanIds]:
    return [image.trace.span for image in images if image.trace.span is not None]

"""Records the spans of rerank requests: the processing with its stages, blob reads and micro-batches.

A span is made when all its values are known; an unsampled request costs one comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workers.ports import Interval, SpanIds
from workers.rerank.request import Piece, Request
from workers.rerank.timeline import Timeline
from workers.telemetry import names
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.tracer import Tracer, child_of, root

if TYPE_CHECKING:
    from workers.rerank.fetching import Read
    from workers.rerank.scoring import ScoredBatch

#: Most requests that a micro-batch's span lists.
MAX_REQUEST_IDS = 100


class RerankSpans:
    """The spans of one rerank worker."""

    def __init__(self, tracer: Tracer, bus: BusSpans, engine_digest: str) -> None:
        self._tracer = tracer
        self.bus = bus
        self._engine_digest = engine_digest

    @classmethod
    def off(cls) -> RerankSpans:
        """Return spans that are never recorded."""
        return cls(Tracer.off(), BusSpans.off(), "")

    def processed(self, request: Request, timeline: Timeline, status: str, error: str | None) -> None:
        """Record the processing of a request; `error` is the code of the reason for a missing ranking."""
        span = request.trace.span
        if span is None:
            return
        attributes: dict[str, Any] = {}
        if request.num_candidates:
            attributes = {names.CANDIDATES.name: request.num_candidates, names.PAIRS.name: request.num_pairs}
        if status == "partial":
            attributes[names.MISSING.name] = int(request.num_pairs - request.scored.sum())
        self.bus.processed(
            request.record,
            request.trace,
            span,
            timeline.total,
            status=status,
            event_id=request.request_id,
            error=error,
            links=request.batches,
            attributes=attributes,
        )
        self.bus.stages(span, timeline.stages)

    def read(self, waiting: Sequence[Piece], read: Read, *, num_images: int, num_bytes: int) -> None:
        """Record a read of blobs, as a child of the first waiting request and linked to the others."""
        sampled = dict.fromkeys(piece.request.trace.span for piece in waiting)
        spans = [span for span in sampled if span is not None]
        if not spans:
            return
        attributes = {
            names.DB_SYSTEM.name: "redis",
            names.DB_OPERATION.name: names.READ.name,
            names.DB_BATCH.name: num_images,
            names.READ_BYTES.name: num_bytes,
        }
        if read.num_attempts > 1:
            attributes[names.ATTEMPTS.name] = read.num_attempts
        self._tracer.record(names.READ, child_of(spans[0]), read.interval, attributes, links=spans[1:])

    def scored(self, batch: ScoredBatch) -> None:
        """Record a micro-batch if one of its requests is sampled, and link those requests to it."""
        requests = list(dict.fromkeys(piece.request for piece in batch.pieces))
        sampled: list[tuple[Request, SpanIds]] = [
            (request, request.trace.span) for request in requests if request.trace.span is not None
        ]
        if not sampled:
            return
        ids = root()
        for request, _ in sampled:
            request.batches.append(ids)
        attributes = {
            names.PAIRS.name: batch.num_pairs,
            names.TOKENS.name: batch.num_tokens,
            names.REQUEST_IDS.name: tuple(request.request_id for request in requests[:MAX_REQUEST_IDS]),
            names.ENGINE.name: self._engine_digest,
        }
        self._tracer.record(names.MICRO_BATCH, ids, batch.interval, attributes, links=[span for _, span in sampled])
        self._tracer.record(names.ENCODE_QUERIES, child_of(ids), batch.encoding, {})
        scoring = child_of(ids)
        self._tracer.record(names.SCORE_PAIRS, scoring, batch.scoring, {})
        if batch.copies is not None:
            # The runtime reports durations only; the copy to the device is first, the copy to the host last.
            began_at, ended_at = batch.scoring
            copied_in = Interval(began_at, began_at + batch.copies.to_device_s)
            copied_out = Interval(ended_at - batch.copies.to_host_s, ended_at)
            self._tracer.record(names.HOST_TO_DEVICE, child_of(scoring), copied_in, {})
            self._tracer.record(names.DEVICE_TO_HOST, child_of(scoring), copied_out, {})

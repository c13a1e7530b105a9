"""The spans of a rerank request: its processing with the stages, the reads it waited for, and its micro-batches.

Made when a thing has ended, of the times that the job keeps anyway; a request that is not recorded costs one look.
Knows nothing of when anything happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.ports import Interval, Record, SpanIds
from workers.rerank.scoring import ScoredBatch
from workers.rerank.state import ActiveRequest, Fetch, Piece, Read
from workers.rerank.timeline import Timeline
from workers.telemetry import names
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.tracer import MessageTrace, Tracer, child_of, root

#: Requests that a micro-batch names: enough to see whom a request shared it with.
MAX_NAMED_REQUESTS = 100


class RerankSpans:
    """The spans of one rerank worker."""

    def __init__(self, tracer: Tracer, bus: BusSpans, engine_digest: str) -> None:
        self._tracer = tracer
        self.bus = bus
        self._engine_digest = engine_digest

    @classmethod
    def off(cls) -> RerankSpans:
        """Records nothing."""
        return cls(Tracer.off(), BusSpans.off(), "")

    def answered(self, active: ActiveRequest, timeline: Timeline, status: str, error: str | None) -> None:
        """The processing of a request that was admitted; `error` says why there is no ranking."""
        span = active.trace.span
        if span is None:
            return
        plan = active.plan
        attributes: dict[str, Any] = {names.CANDIDATES.name: plan.num_candidates, names.PAIRS.name: plan.num_pairs}
        if status == "partial":
            attributes[names.MISSING.name] = int(plan.num_pairs - active.scored.sum())
        self.bus.processed(
            active.record,
            active.trace,
            span,
            timeline.total,
            status=status,
            event_id=plan.request_id,
            error=error,
            links=active.batches,
            attributes=attributes,
        )
        self.bus.stages(span, timeline.stages)

    def refused(
        self, record: Record, trace: MessageTrace, timeline: Timeline, request_id: str | None, code: str
    ) -> None:
        """The processing of a record that was refused when it was taken."""
        if trace.span is None:
            return
        self.bus.processed(
            record,
            trace,
            trace.span,
            timeline.total,
            status="error" if request_id is not None else "dead_letter",
            event_id=request_id,
            error=code,
            attributes={},
        )
        self.bus.stages(trace.span, timeline.stages)

    def read(self, fetch: Fetch, read: Read, num_bytes: int) -> None:
        """A read of blobs, under the first of the requests that wait for it and linked to the others."""
        waiting = _recorded(fetch.waiting)
        if not waiting:
            return
        attributes = {
            names.DB_SYSTEM.name: "redis",
            names.DB_OPERATION.name: names.READ.name,
            names.DB_BATCH.name: len(fetch.images),
            names.READ_BYTES.name: num_bytes,
        }
        if read.num_attempts > 1:
            attributes[names.ATTEMPTS.name] = read.num_attempts
        self._tracer.record(names.READ, child_of(waiting[0]), read.interval, attributes, links=waiting[1:])

    def scored(self, batch: ScoredBatch) -> None:
        """A micro-batch, if one of its requests is recorded; each of those learns of it."""
        requests = list(dict.fromkeys(ready.piece.request for ready in batch.pieces))
        recorded = [request for request in requests if request.trace.span is not None]
        if not recorded:
            return
        ids = root()
        for request in recorded:
            request.batches.append(ids)
        attributes = {
            names.PAIRS.name: batch.num_pairs,
            names.TOKENS.name: batch.num_tokens,
            names.REQUEST_IDS.name: tuple(request.plan.request_id for request in requests[:MAX_NAMED_REQUESTS]),
            names.ENGINE.name: self._engine_digest,
        }
        links = [request.trace.span for request in recorded if request.trace.span is not None]
        self._tracer.record(names.MICRO_BATCH, ids, batch.interval, attributes, links=links)
        self._tracer.record(names.ENCODE_QUERIES, child_of(ids), batch.encoding, {})
        scoring = child_of(ids)
        self._tracer.record(names.SCORE_PAIRS, scoring, batch.scoring, {})
        if batch.copies is not None:
            # The runtime tells how long they took and not when: copying in comes first and copying out last.
            began_at, ended_at = batch.scoring
            copied_in = Interval(began_at, began_at + batch.copies.to_device_s)
            copied_out = Interval(ended_at - batch.copies.to_host_s, ended_at)
            self._tracer.record(names.HOST_TO_DEVICE, child_of(scoring), copied_in, {})
            self._tracer.record(names.DEVICE_TO_HOST, child_of(scoring), copied_out, {})


def _recorded(pieces: Sequence[Piece]) -> list[SpanIds]:
    """The spans of the requests of these pieces, each once."""
    spans = (piece.request.trace.span for piece in pieces)
    return list(dict.fromkeys(span for span in spans if span is not None))

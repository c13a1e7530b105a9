"""The rerank job: requests in, one reply each out.

A request is admitted and cut into pieces; pieces wait their fair turn, get their images into the token slab, join a
micro-batch and are scored; when the last piece of a request is back, its reply is made. What is late is answered as
expired before it costs a fetch, and again before it costs the engine. Knows neither Kafka nor Redis; the loop's clock
comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from workers.errors import Poison
from workers.metrics import Metrics
from workers.ports import Finished, Partition, Record
from workers.rerank.admission import AdmissionLimits, Encode, PieceLayout, admit, reply_topic_of
from workers.rerank.backlog import Backlog
from workers.rerank.batching import MicroBatcher
from workers.rerank.fairness import FairQueue
from workers.rerank.loading import SlabLoader
from workers.rerank.replies import Replies
from workers.rerank.scoring import BatchScorer
from workers.rerank.spans import RerankSpans
from workers.rerank.state import ActiveRequest, Deadlines, Piece, ReadyPiece

#: Pieces in the queue before those of closed requests are first looked for.
MIN_SWEEP_PIECES = 1024


@dataclass(frozen=True, slots=True)
class RerankBounds:
    """How much a worker has in work at once."""

    max_inflight_pairs: int
    max_fetches: int
    max_ready_pairs: int  # pieces ahead of the engine: two batches' worth; the rest waits where order is still open


class RerankJob:
    """Implements `workers.ports.Job` for rerank requests."""

    def __init__(
        self,
        *,
        limits: AdmissionLimits,
        bounds: RerankBounds,
        num_visual_tokens: int,
        encode: Encode,
        loader: SlabLoader,
        batcher: MicroBatcher[ReadyPiece],
        scorer: BatchScorer,
        replies: Replies,
        metrics: Metrics,
        spans: RerankSpans,
        backlog: Backlog,
        wall_clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._bounds = bounds
        self._num_visual_tokens = num_visual_tokens
        self._encode = encode
        self._loader = loader
        self._batcher = batcher
        self._scorer = scorer
        self._replies = replies
        self._metrics = metrics
        self._spans = spans
        self._backlog = backlog
        self._wall_clock = wall_clock
        self._active: dict[tuple[Partition, int], ActiveRequest] = {}
        self._queue: FairQueue[Piece] = FairQueue()
        self._deadlines = Deadlines()
        self._finished: list[Finished] = []
        self._num_inflight_pairs = 0
        self._num_inflight_tokens = 0
        self._sweep_at = MIN_SWEEP_PIECES
        self._made_room = False  # since pieces were last started

    def has_room(self) -> bool:
        return self._num_inflight_pairs < self._bounds.max_inflight_pairs

    def num_active(self) -> int:
        return len(self._active)

    def num_inflight_pairs(self) -> int:
        """Pairs of the requests in work, one for each candidate."""
        return self._num_inflight_pairs

    def backlog_s(self, lag_events: int) -> float | None:
        """Seconds of work that wait here and, with this lag, in the partitions of this worker; None: not known yet."""
        return self._backlog.seconds(num_tokens=self._num_inflight_tokens, lag_events=lag_events)

    def accept(self, record: Record, now: float) -> None:
        trace = self._spans.bus.begin(record)
        reply_topic = self._limits.reply_topic
        try:
            request = self._replies.read(record)
            reply_topic = reply_topic_of(request, self._limits)
            plan = admit(request, self._limits, self._encode, now=now, wall_now=self._wall_clock())
        except Poison as poison:
            self._finished.append(self._replies.refused(record, trace, poison, reply_topic, now))
            return
        num_tokens = sum(map(self._tokens_of, plan.pieces))
        active = ActiveRequest.of(record, trace, plan, now, num_tokens=num_tokens)
        self._active[record.partition, record.offset] = active
        self._num_inflight_pairs += plan.num_candidates
        self._num_inflight_tokens += num_tokens
        self._backlog.accepted(num_tokens)
        if active.is_late(now):
            self._expire(active, now)
            return
        if plan.deadline is not None:
            self._deadlines.push(plan.deadline, active)
        for layout in plan.pieces:
            images = plan.images if len(plan.images) <= 1 else [plan.images[pair] for pair in layout.pairs]
            piece = Piece(active, layout, images=images)
            piece.rank = self._queue.push(piece, flow=id(active), cost=self._tokens_of(layout), priority=plan.priority)
        self._queue.end_flow(id(active))
        self._sweep_queue()
        if not plan.pieces:
            self._answer(active, now)

    def refuse(self, record: Record, error: Poison, now: float) -> None:
        active = self._active.get((record.partition, record.offset))
        if active is not None:
            self._close(active)
        trace = active.trace if active is not None else self._spans.bus.begin(record)
        reply_topic = active.plan.reply_topic if active is not None else self._limits.reply_topic
        self._finished.append(self._replies.refused(record, trace, error, reply_topic, now))

    def _sweep_queue(self) -> None:
        """Forget pieces of closed requests: while the store is away none of them would ever come to its turn."""
        if len(self._queue) >= self._sweep_at:
            self._queue.discard(lambda piece: piece.request.is_closed)
            self._sweep_at = max(MIN_SWEEP_PIECES, 2 * len(self._queue))

    def _tokens_per_pair(self, layout: PieceLayout) -> int:
        return layout.bucket + self._num_visual_tokens

    def _tokens_of(self, layout: PieceLayout) -> int:
        return len(layout.pairs) * self._tokens_per_pair(layout)

    def turn(self, now: float) -> list[Finished]:
        for batch in self._scorer.turn():
            self._spans.scored(batch)
            self._metrics.observe_batch(
                num_pairs=batch.num_pairs,
                num_tokens=batch.num_tokens,
                max_tokens=self._batcher.max_tokens,
                seconds=batch.interval.seconds,
            )
            self._backlog.scored(batch.num_tokens, batch.interval.seconds)
            start = 0
            for ready in batch.pieces:
                stop = start + ready.num_pairs
                active = ready.piece.request
                active.logits[ready.pairs] = batch.logits[start:stop]
                active.scored[ready.pairs] = True
                active.scoring_at, active.scored_at = batch.interval
                self._end(ready.piece, now)
                start = stop
        self._expire_the_late(now)
        self._take_loaded(now)  # first, because fetches that have ended make room for others
        self._start_pieces(now)
        self._take_loaded(now)  # again, because what lies in the slab is ready at once
        self._start_batches(now)
        finished, self._finished = self._finished, []
        return finished

    def _start_pieces(self, now: float) -> None:
        """Give pieces their slots and fetches, in fair order, no further ahead of the engine than is useful."""
        bounds = self._bounds
        self._made_room = False
        num_ready = self._batcher.num_pairs
        while self._queue and self._loader.num_fetching < bounds.max_fetches and num_ready < bounds.max_ready_pairs:
            piece = self._queue.peek()
            active = piece.request
            if active.is_closed:
                self._queue.pop()
                continue
            if not self._loader.start(piece):
                return
            self._queue.pop()
            if piece.num_fetches == 0:
                num_ready += len(piece.layout.pairs)
            if active.started_at is None:
                active.started_at = now
                self._metrics.observe_queue_wait(now - active.accepted_at, active.trace.exemplar())

    def _take_loaded(self, now: float) -> None:
        for piece in self._loader.turn():
            self._make_ready(piece, now)

    def _make_ready(self, piece: Piece, now: float) -> None:
        active = piece.request
        active.fetched_at = max(now, piece.read_at)  # a fast store answers within one turn, which has one `now`
        active.num_unready_pieces -= 1
        pairs, slots = piece.present()
        if active.is_closed or not pairs:
            self._end(piece, now)
            return
        assert piece.rank is not None  # set when it was queued
        ready = ReadyPiece(piece, pairs, slots, len(pairs), self._tokens_per_pair(piece.layout))
        self._batcher.add(ready, piece.layout.bucket, piece.rank, now)

    def _start_batches(self, now: float) -> None:
        while self._scorer.has_room():
            more_is_coming = len(self._queue) > 0 or self._loader.num_fetching > 0
            batch = self._batcher.take(now, more_is_coming=more_is_coming)
            if not batch:
                return
            self._made_room = True
            wanted = []
            for ready in batch:
                if ready.piece.request.is_late(now) and not ready.piece.request.is_closed:
                    self._expire(ready.piece.request, now)
                if ready.piece.request.is_closed:
                    self._end(ready.piece, now)
                else:
                    wanted.append(ready)
            if wanted:
                self._scorer.submit(wanted)

    def _end(self, piece: Piece, now: float) -> None:
        """A piece is through: free its slots, and answer the request if it was the last."""
        self._loader.release(piece)
        self._made_room = True
        active = piece.request
        active.num_open_pieces -= 1
        if active.is_closed:
            return
        num_tokens = self._tokens_of(piece.layout)
        active.num_open_tokens -= num_tokens
        self._num_inflight_tokens -= num_tokens
        if active.num_open_pieces == 0:
            self._answer(active, now)

    def _answer(self, active: ActiveRequest, now: float) -> None:
        self._finished.append(self._replies.answered(active, now))
        self._close(active)

    def _expire_the_late(self, now: float) -> None:
        for active in self._deadlines.passed(now):
            self._expire(active, now)

    def _expire(self, active: ActiveRequest, now: float) -> None:
        self._finished.append(self._replies.expired(active, now))
        self._close(active)

    def _close(self, active: ActiveRequest) -> None:
        active.is_closed = True
        del self._active[active.record.partition, active.record.offset]
        self._num_inflight_pairs -= active.plan.num_candidates
        self._num_inflight_tokens -= active.num_open_tokens

    def wants_turn_in_s(self, now: float) -> float | None:
        waits = []
        if self._scorer.has_room():
            wait = self._batcher.wants_turn_in_s(now)
            if wait is not None:
                waits.append(wait)
        deadline = self._deadlines.next()
        if deadline is not None:
            waits.append(max(0.0, deadline - now))
        if self._finished or (self._made_room and self._queue):
            waits.append(0.0)
        return min(waits) if waits else None

    def drop(self, partitions: Collection[Partition]) -> None:
        for (partition, _), active in list(self._active.items()):
            if partition in partitions:
                self._close(active)
        self._finished = [done for done in self._finished if done.record.partition not in partitions]

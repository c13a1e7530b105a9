"""Turns each rerank request into its one outcome.

A request is read, its texts are encoded, and it is cut into pieces. Pieces wait for their fair turn, load their images
into the token slab, join a micro-batch and are scored; after the last piece the request is answered. A late request is
answered as expired before it costs a fetch, and again before it costs the engine. Knows neither Kafka nor Redis; the
loop's clock is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.text import EncodedText
from protocols.encoding import CANCEL_HEADER
from trt.text_lengths import padded_length
from workers.errors import Poison, as_internal_error
from workers.landing import Landing
from workers.metrics import Metrics
from workers.ports import Finished, Partition, Record
from workers.rerank.admission import AdmissionLimits, open_request, read_request, salvage_address
from workers.rerank.batching import MicroBatcher
from workers.rerank.explaining import Words, explanations_of, pairs_to_explain
from workers.rerank.fairness import FairQueue
from workers.rerank.invalidation import Invalidation
from workers.rerank.loading import SlabLoader
from workers.rerank.ranking import NotFinite
from workers.rerank.replies import Replies
from workers.rerank.request import Deadlines, Piece, Request, cut, piece_of
from workers.rerank.scoring import Backlog, BatchScorer
from workers.rerank.spans import RerankSpans
from workers.rerank.texts import TextEncoder, warnings_about

#: Number of queued pieces at which the pieces of closed requests are first removed.
MIN_SWEEP_PIECES = 1024


@dataclass(frozen=True, slots=True)
class RerankBounds:
    """Limits on the work that a worker accepts and starts at one time."""

    max_inflight_pairs: int
    max_inflight_bytes: int  # bytes of the records in work
    max_fetches: int
    max_ready_pairs: int  # pairs of started pieces: about two batches; others wait in the fair queue
    piece_pairs: int


class RerankJob:
    """Implements `workers.ports.Job` for rerank requests."""

    def __init__(
        self,
        *,
        limits: AdmissionLimits,
        bounds: RerankBounds,
        num_visual_tokens: int,
        landing: Landing,
        texts: TextEncoder,
        loader: SlabLoader,
        invalidation: Invalidation,
        batcher: MicroBatcher[Piece],
        scorer: BatchScorer,
        replies: Replies,
        metrics: Metrics,
        spans: RerankSpans,
        words: Words,
        wall_clock: Callable[[], float],
    ) -> None:
        """`landing` is shared by texts, loader and scorer."""
        self._limits = limits
        self._bounds = bounds
        self._num_visual_tokens = num_visual_tokens
        self._landing = landing
        self._texts = texts
        self._loader = loader
        self._invalidation = invalidation
        self._batcher = batcher
        self._scorer = scorer
        self._replies = replies
        self._metrics = metrics
        self._spans = spans
        self._words = words
        self._wall_clock = wall_clock
        self._backlog = Backlog()
        self._open: dict[tuple[Partition, int], Request] = {}
        self._queue: FairQueue[Piece] = FairQueue()
        self._explaining: deque[Piece] = deque()  # ready for the engine
        self._deadlines = Deadlines()
        self._finished: list[Finished] = []
        self._num_inflight_pairs = 0
        self._num_inflight_bytes = 0
        self._num_inflight_tokens = 0
        self._num_started = 0
        self._sweep_at = MIN_SWEEP_PIECES
        self._made_room = False  # room was made since pieces were last started
        self._has_more_changes = False

    def has_room(self) -> bool:
        return (
            self._num_inflight_pairs < self._bounds.max_inflight_pairs
            and self._num_inflight_bytes < self._bounds.max_inflight_bytes
        )

    def num_active(self) -> int:
        return len(self._open)

    def num_inflight_pairs(self) -> int:
        """Return the number of candidates of the requests in work."""
        return self._num_inflight_pairs

    def backlog_s(self, lag_events: int) -> float | None:
        """Return the seconds of work that wait here and, by this lag, in the partitions; None if unknown."""
        return self._backlog.seconds(num_tokens=self._num_inflight_tokens, lag_events=lag_events)

    def accept(self, record: Record, now: float) -> None:
        if record.value is None and any(name == CANCEL_HEADER for name, _ in record.headers):
            self._withdraw(record, now)
            return
        request = self._begin(record, now)
        try:
            read_request(request, self._limits, now=now, wall_now=self._wall_clock())
            request.num_inflight_pairs = request.num_candidates
            self._num_inflight_pairs += request.num_inflight_pairs
            if request.is_late(now):
                self._expire(request, now)
                return
            if request.deadline is not None:
                self._deadlines.push(request.deadline, request)
            self._texts.start(request)
            self._queue_encoded(now)
        except Exception as error:
            self._fail(request, error, now)

    def _withdraw(self, record: Record, now: float) -> None:
        """Expire the request that the record's key names, unless its pieces have started: its caller has left."""
        request_id = (record.key or b"").decode("utf-8", "replace")
        withdrawn = [
            request
            for request in self._open.values()
            if request.request_id == request_id and request.started_at is None
        ]
        for request in withdrawn:
            self._expire(request, now)
        self._metrics.count_event("skipped")
        self._finished.append(Finished(record, ()))

    def refuse(self, record: Record, error: Poison, now: float) -> None:
        request = self._open.get((record.partition, record.offset)) or self._begin(record, now)
        self._fail(request, error, now)

    def _begin(self, record: Record, now: float) -> Request:
        request = open_request(record, self._spans.bus.begin(record), self._limits, now)
        self._open[record.partition, record.offset] = request
        self._num_inflight_bytes += record.num_bytes()
        return request

    def turn(self, now: float) -> list[Finished]:
        self._has_more_changes = self._invalidation.turn()  # first, so that later pieces do not use the old tokens
        self._landing.turn()
        for request, error in (*self._texts.take_failed(), *self._loader.take_failed()):
            self._fail(request, error, now)
        self._take_scored(now)
        self._queue_encoded(now)
        for request in self._deadlines.passed(now):
            self._expire(request, now)
        self._take_loaded(now)  # before starting pieces, because an ended fetch makes room for another
        self._start_pieces(now)
        self._take_loaded(now)  # again, because a piece with all images in the slab is ready at once
        self._start_batches(now)
        finished, self._finished = self._finished, []
        return finished

    def _queue_encoded(self, now: float) -> None:
        """Cut the requests with encoded texts into pieces, and queue the pieces."""
        for request, encoded in self._texts.take_ready():
            if request.is_closed:
                continue
            try:
                self._queue_pieces(request, encoded, now)
            except Exception as error:
                self._fail(request, error, now)
        if len(self._queue) >= self._sweep_at:  # while the store is away, closed requests' pieces are never popped
            self._queue.discard(lambda piece: piece.request.is_closed)
            self._sweep_at = max(MIN_SWEEP_PIECES, 2 * len(self._queue))

    def _queue_pieces(self, request: Request, encoded: Sequence[EncodedText], now: float) -> None:
        if request.direction == "text-to-image" and encoded and encoded[0].num_pieces == 0:
            raise Poison("query_empty", "the query has no words that the model could read")
        for code, message in warnings_about(request, encoded):
            request.warn(code, message)
        request.text_ids = [text.ids for text in encoded]
        pieces = cut(request, piece_pairs=self._bounds.piece_pairs, num_visual_tokens=self._num_visual_tokens)
        request.num_open_pieces = request.num_unready_pieces = len(pieces)
        request.num_open_tokens = sum(piece.num_tokens for piece in pieces)
        self._num_inflight_tokens += request.num_open_tokens
        self._backlog.accepted(request.num_open_tokens)
        if not pieces:
            self._answer(request, now)
            return
        self._queue.push(pieces, [piece.num_tokens for piece in pieces], priority=request.priority)
        self._made_room = True

    def _start_pieces(self, now: float) -> None:
        """Start pieces in fair order: assign slots and start fetches, only as far ahead of the engine as is useful."""
        bounds = self._bounds
        self._made_room = False
        num_ready = self._batcher.num_pairs
        while self._queue and self._loader.num_fetching < bounds.max_fetches and num_ready < bounds.max_ready_pairs:
            piece = self._queue.peek()
            request = piece.request
            if request.is_closed:
                self._queue.pop()
                continue
            if not self._loader.start(piece):
                return
            self._queue.pop()
            self._num_started += 1
            piece.rank = self._num_started
            if piece.num_fetches == 0:
                num_ready += piece.num_pairs
            if request.started_at is None:
                request.started_at = now
                self._metrics.observe_queue_wait(now - request.accepted_at, request.trace.exemplar())

    def _take_loaded(self, now: float) -> None:
        for piece in self._loader.take_ready():
            request = piece.request
            request.num_unready_pieces -= 1
            piece.leave_out_missing()
            if not piece.explains:
                request.fetched_at = max(now, piece.read_at)  # a store may answer during the turn, after `now`
            if request.is_closed or piece.num_pairs == 0:
                self._end(piece, now)
            elif piece.explains:
                self._explaining.append(piece)
            else:
                self._batcher.add(piece, piece.rank, now)

    def _start_batches(self, now: float) -> None:
        while self._explaining and self._scorer.has_room():
            piece = self._explaining.popleft()
            if piece.request.is_closed:
                self._end(piece, now)
            else:
                self._scorer.submit_explanation(piece)
        while self._scorer.has_room():
            more_is_coming = len(self._queue) > 0 or self._loader.num_fetching > 0
            batch = self._batcher.take(now, more_is_coming=more_is_coming)
            if not batch:
                return
            self._made_room = True
            wanted = []
            for piece in batch:
                if piece.request.is_late(now) and not piece.request.is_closed:
                    self._expire(piece.request, now)
                if piece.request.is_closed:
                    self._end(piece, now)
                else:
                    wanted.append(piece)
            if wanted:
                self._scorer.submit(wanted)

    def _take_scored(self, now: float) -> None:
        for batch in self._scorer.take_scored():
            self._spans.scored(batch)
            self._metrics.observe_batch(
                num_pairs=batch.num_pairs,
                num_tokens=batch.num_tokens,
                max_tokens=self._batcher.max_tokens,
                seconds=batch.interval.seconds,
            )
            self._backlog.scored(batch.num_tokens, batch.interval.seconds)
            start = 0
            for piece in batch.pieces:
                request, stop = piece.request, start + piece.num_pairs
                request.logits[piece.pairs] = batch.logits[start:stop]
                request.scored[piece.pairs] = True
                request.scoring_at, request.scored_at = batch.interval
                self._end(piece, now)
                start = stop

        for piece, similarities in self._scorer.take_explained():
            self._explain(piece, similarities, now)
            self._end(piece, now)

    def _explain(self, piece: Piece, similarities: Sequence[NDArray[np.float32]], now: float) -> None:
        request = piece.request
        if request.is_closed:
            return
        try:
            request.explanations = explanations_of(request, piece.pairs, similarities, self._words)
        except Exception as error:
            self._fail(request, error, now)

    def _end(self, piece: Piece, now: float) -> None:
        """Free the slots of a piece, and answer its request if this was the last piece."""
        self._loader.release(piece)
        self._made_room = True
        request = piece.request
        request.num_open_pieces -= 1
        if request.is_closed:
            return
        request.num_open_tokens -= piece.num_tokens
        self._num_inflight_tokens -= piece.num_tokens
        if request.num_open_pieces == 0:
            self._answer(request, now)

    def _answer(self, request: Request, now: float) -> None:
        try:
            if request.explain and request.ranking is None and self._start_explanation(request):
                return
            self._finish(request, self._replies.ranked(request, now))
        except Exception as error:
            self._fail(request, error, now)

    def _start_explanation(self, request: Request) -> bool:
        """Queue a piece that explains the best results; returns False if nothing can be explained."""
        if not self._scorer.can_explain():
            request.warn("explanation_unavailable", "this model or this engine cannot explain its scores")
            return False
        try:
            request.ranking = self._replies.rank(request)
        except NotFinite:
            return False  # `ranked` writes the error reply
        pairs = pairs_to_explain(request, num_visual_tokens=self._num_visual_tokens, max_pairs=self._bounds.piece_pairs)
        if len(pairs) == 0:
            return False
        bucket = padded_length(max(len(request.text_ids[request.text_of_pair(pair)]) for pair in pairs.tolist()))
        piece = piece_of(request, pairs, bucket, self._num_visual_tokens, explains=True)
        request.num_open_pieces += 1
        request.num_unready_pieces += 1
        request.num_open_tokens += piece.num_tokens
        self._num_inflight_tokens += piece.num_tokens
        self._queue.push([piece], [piece.num_tokens], priority=request.priority)
        self._made_room = True
        return True

    def _expire(self, request: Request, now: float) -> None:
        try:
            if request.ranking is None:
                self._finish(request, self._replies.expired(request, now))
            else:  # scored in time; only the explanation is late
                request.warn("explanation_late", "the deadline passed before the results were explained")
                self._finish(request, self._replies.ranked(request, now))
        except Exception as error:
            self._fail(request, error, now)

    def _fail(self, request: Request, error: Exception, now: float) -> None:
        """Give a request the outcome of an error; an unexpected error is reported as `internal_error`."""
        if request.is_closed:
            return
        if request.request_id is None:
            salvage_address(request, self._limits)
        poison = as_internal_error(error, **request.for_log())
        try:
            finished = self._replies.refused(request, poison, now)
        except Exception as second:
            request.request_id = None  # no reply can be written, so only the dead letter is published
            finished = self._replies.refused(request, as_internal_error(second, **request.for_log()), now)
        self._finish(request, finished)

    def _finish(self, request: Request, finished: Finished) -> None:
        self._finished.append(finished)
        self._close(request)

    def _close(self, request: Request) -> None:
        request.is_closed = True
        record = request.record
        del self._open[record.partition, record.offset]
        self._num_inflight_pairs -= request.num_inflight_pairs
        self._num_inflight_bytes -= record.num_bytes()
        self._num_inflight_tokens -= request.num_open_tokens

    def wants_turn_in_s(self, now: float) -> float | None:
        waits = []
        if self._scorer.has_room():
            wait = self._batcher.wants_turn_in_s(now)
            if wait is not None:
                waits.append(wait)
        deadline = self._deadlines.next()
        if deadline is not None:
            waits.append(max(0.0, deadline - now))
        if self._finished or self._has_more_changes or (self._made_room and self._queue):
            waits.append(0.0)
        return min(waits) if waits else None

    def drop(self, partitions: Collection[Partition]) -> None:
        for request in list(self._open.values()):
            if request.record.partition in partitions:
                self._close(request)
        self._finished = [done for done in self._finished if done.record.partition not in partitions]

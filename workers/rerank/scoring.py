"""Runs micro-batches on the engine one by one on a thread, and estimates how long waiting work takes.

Makes the engine's input arrays from ready pieces. Knows nothing of how the logits are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from trt.contract import DeviceCopies, ExplainsPairs, PairScorer, ReportsCopies
from workers.landing import Landing
from workers.ports import Interval
from workers.rerank.request import Piece

#: One batch on the engine and one waiting, so that the engine does not wait for the loop between two batches.
MAX_BATCHES = 2
#: Half-lives of the backlog's averages: in requests for the request size, in busy seconds for the engine's rate.
HALF_LIFE_REQUESTS = 256
HALF_LIFE_BUSY_S = 10.0


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The logits of a batch, in the order of its pieces and their pairs."""

    pieces: Sequence[Piece]
    logits: NDArray[np.float32]
    encoding: Interval  # encoding the queries
    scoring: Interval  # scoring the pairs, right after the encoding
    copies: DeviceCopies | None  # None: the runtime does not report them

    @property
    def interval(self) -> Interval:
        return Interval(self.encoding.started_at, self.scoring.ended_at)

    @property
    def num_pairs(self) -> int:
        return sum(piece.num_pairs for piece in self.pieces)

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_pairs * piece.tokens_per_pair for piece in self.pieces)


class BatchScorer:
    """Scores submitted batches, in order."""

    def __init__(self, engine: PairScorer, *, executor: Executor, landing: Landing, clock: Callable[[], float]) -> None:
        """`executor` has one thread, because the engine takes one call at a time."""
        self._engine = engine
        self._last_copies = engine.last_copies if isinstance(engine, ReportsCopies) else None
        self._landing = landing
        self._clock = clock
        self._executor = executor
        self._explainer = engine if isinstance(engine, ExplainsPairs) and engine.can_explain() else None
        self._num_running = 0
        self._scored: list[ScoredBatch] = []
        self._explained: list[tuple[Piece, Sequence[NDArray[np.float32]]]] = []

    def has_room(self) -> bool:
        return self._num_running < MAX_BATCHES

    def submit(self, pieces: Sequence[Piece]) -> None:
        """Score a batch. The landing's turn raises any exception of the engine: it ends the worker."""
        self._num_running += 1
        self._landing.start(self._executor, partial(self._score, pieces), self._land)

    def can_explain(self) -> bool:
        return self._explainer is not None

    def submit_explanation(self, piece: Piece) -> None:
        """Compute the similarities of a piece's pairs."""
        self._num_running += 1
        self._landing.start(self._executor, partial(self._explain, piece), partial(self._land_explanation, piece))

    def _explain(self, piece: Piece) -> Sequence[NDArray[np.float32]]:
        assert self._explainer is not None  # callers check `can_explain` first
        texts, pair_query, pair_slot = batch_arrays([piece])
        return self._explainer.token_similarities(texts, pair_query, pair_slot)

    def _land_explanation(self, piece: Piece, similarities: Sequence[NDArray[np.float32]]) -> None:
        self._num_running -= 1
        self._explained.append((piece, similarities))

    def take_explained(self) -> list[tuple[Piece, Sequence[NDArray[np.float32]]]]:
        """Return the finished pieces with `(text tokens, visual tokens)` similarities of each pair."""
        explained, self._explained = self._explained, []
        return explained

    def _land(self, batch: ScoredBatch) -> None:
        self._num_running -= 1
        self._scored.append(batch)

    def take_scored(self) -> list[ScoredBatch]:
        """Return the scored batches since the last call."""
        scored, self._scored = self._scored, []
        return scored

    def _score(self, pieces: Sequence[Piece]) -> ScoredBatch:
        started_at = self._clock()
        texts, pair_query, pair_slot = batch_arrays(pieces)
        queries = self._engine.encode_queries(texts)
        encoded_at = self._clock()
        logits = self._engine.score_pairs(queries, pair_query, pair_slot)
        copies = None if self._last_copies is None else self._last_copies()
        encoding, scoring = Interval(started_at, encoded_at), Interval(encoded_at, self._clock())
        return ScoredBatch(pieces, logits, encoding, scoring, copies)

    def close(self) -> None:
        """Wait for the batch on the engine and end its thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def batch_arrays(
    pieces: Sequence[Piece],
) -> tuple[list[Sequence[int]], NDArray[np.int32], NDArray[np.int32]]:
    """Return the distinct texts of a batch, and the index of its text and the slot of its image for each pair."""
    texts: list[Sequence[int]] = []
    shared: dict[int, int] = {}  # index of the query's text by request, for requests of one text
    queries: list[NDArray[np.int32]] = []
    for piece in pieces:
        request, num_pairs = piece.request, piece.num_pairs
        if len(request.text_ids) == 1:
            number = shared.setdefault(id(request), len(texts))
            if number == len(texts):
                texts.append(request.text_ids[0])
            queries.append(np.full(num_pairs, number, np.int32))
        else:
            queries.append(np.arange(len(texts), len(texts) + num_pairs, dtype=np.int32))
            texts += [request.text_ids[pair] for pair in piece.pairs.tolist()]
    return texts, np.concatenate(queries), np.concatenate([piece.pair_slots() for piece in pieces])


class Backlog:
    """Estimates the seconds of work that wait for this worker; an autoscaler sums the estimates of all workers.

    Work is counted in tokens, because requests differ in size; a message still in Kafka counts as an average recent
    request. The rate is the busy engine's. If another part is slower than the engine (such as a
    slow store), the estimate is too low.
    """

    def __init__(self) -> None:
        self._requests = self._request_tokens = 0.0
        self._busy_s = self._scored_tokens = 0.0

    def accepted(self, num_tokens: int) -> None:
        """Record a request of this many tokens."""
        kept = 0.5 ** (1 / HALF_LIFE_REQUESTS)
        self._requests = self._requests * kept + 1
        self._request_tokens = self._request_tokens * kept + num_tokens

    def scored(self, num_tokens: int, busy_s: float) -> None:
        """Record a batch that kept the engine busy for this long."""
        kept = 0.5 ** (busy_s / HALF_LIFE_BUSY_S)
        self._busy_s = self._busy_s * kept + busy_s
        self._scored_tokens = self._scored_tokens * kept + num_tokens

    def seconds(self, *, num_tokens: int, lag_events: int) -> float | None:
        """Return the time for these tokens and messages.

        Returns 0 without work, and None before the first batch and request, when rate and size are unknown; a
        sum over workers then omits this worker.
        """
        if num_tokens == 0 and lag_events == 0:
            return 0.0
        if self._busy_s == 0 or self._requests == 0:
            return None
        waiting = num_tokens + lag_events * self._request_tokens / self._requests
        return waiting * self._busy_s / self._scored_tokens

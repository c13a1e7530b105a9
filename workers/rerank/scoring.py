"""Runs micro-batches on the engine, one after the other on a thread of the engine's own.

Turns ready pieces into the few small arrays that the engine takes and hands the logits back. Knows nothing of
requests' fates: who waits for the logits decides what they are for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt.contract import DeviceCopies, PairScorer, ReportsCopies
from workers.ports import Interval
from workers.rerank.state import ReadyPiece

#: One batch on the engine and one behind it, so that the engine does not wait for the loop between two.
MAX_BATCHES = 2


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The logits of a batch, pieces and pairs in the order they went in."""

    pieces: Sequence[ReadyPiece]
    logits: NDArray[np.float32]
    encoding: Interval  # of its queries
    scoring: Interval  # of its pairs, right behind
    copies: DeviceCopies | None  # None where the runtime does not tell

    @property
    def interval(self) -> Interval:
        return Interval(self.encoding.started_at, self.scoring.ended_at)

    @property
    def num_pairs(self) -> int:
        return sum(ready.num_pairs for ready in self.pieces)

    @property
    def num_tokens(self) -> int:
        return sum(ready.num_pairs * ready.tokens_per_pair for ready in self.pieces)


class BatchScorer:
    """Batches in, scored batches out, in order."""

    def __init__(
        self, engine: PairScorer, executor: Executor, wake: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        """`executor` has one thread, because the engine takes one call at a time."""
        self._engine = engine
        self._last_copies = engine.last_copies if isinstance(engine, ReportsCopies) else None
        self._wake = wake
        self._clock = clock
        self._executor = executor
        self._flying: deque[Future[ScoredBatch]] = deque()

    def has_room(self) -> bool:
        return len(self._flying) < MAX_BATCHES

    def submit(self, pieces: Sequence[ReadyPiece]) -> None:
        future = self._executor.submit(self._score, pieces)
        self._flying.append(future)
        future.add_done_callback(lambda _: self._wake())

    def turn(self) -> list[ScoredBatch]:
        """Return the batches that are done. Raises what the engine raised: there is no remedy for it here."""
        scored = []
        while self._flying and self._flying[0].done():
            scored.append(self._flying.popleft().result())
        return scored

    def _score(self, pieces: Sequence[ReadyPiece]) -> ScoredBatch:
        started_at = self._clock()
        texts, pair_query, pair_slot = batch_arrays(pieces)
        queries = self._engine.encode_queries(texts)
        encoded_at = self._clock()
        logits = self._engine.score_pairs(queries, pair_query, pair_slot, first_stage_scores(pieces))
        copies = None if self._last_copies is None else self._last_copies()
        encoding, scoring = Interval(started_at, encoded_at), Interval(encoded_at, self._clock())
        return ScoredBatch(pieces, logits, encoding, scoring, copies)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def batch_arrays(
    pieces: Sequence[ReadyPiece],
) -> tuple[list[Sequence[int]], NDArray[np.int32], NDArray[np.int32]]:
    """The batch as the engine takes it: the texts, each once, and for each pair its text's number and its slot."""
    texts: list[Sequence[int]] = []
    numbers: dict[tuple[int, int], int] = {}
    queries: list[NDArray[np.int32]] = []
    for ready in pieces:
        plan = ready.piece.request.plan
        wanted = [0] if len(plan.texts) == 1 else ready.pairs
        for text in wanted:
            key = (id(plan), text)
            if key not in numbers:
                numbers[key] = len(texts)
                texts.append(plan.texts[text])
        found = [numbers[id(plan), text] for text in wanted]
        one = len(found) == 1
        queries.append(np.full(ready.num_pairs, found[0], np.int32) if one else np.array(found, np.int32))
    slots = [slot for ready in pieces for slot in ready.slots]
    return texts, np.concatenate(queries), np.array(slots, np.int32)


def first_stage_scores(pieces: Sequence[ReadyPiece]) -> NDArray[np.float32] | None:
    """What the first stage gave each pair of the batch; None where the requests were admitted without."""
    scores = [given[ready.pairs] for ready in pieces if (given := ready.piece.request.plan.first_stage) is not None]
    return np.concatenate(scores) if scores else None

"""Groups ready pieces of requests into micro-batches for the engine.

Decides which pieces form a batch and when; knows nothing of Kafka, tensors or the clock. A batch holds pieces of one
length bucket, so padding is at most a bucket's width. It is filled in rank order up to a budget of tokens and
pairs.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Batchable(Protocol):
    """The properties of a piece that the batcher reads."""

    @property
    def num_pairs(self) -> int: ...

    @property
    def bucket(self) -> int:
        """The padded text length."""
        ...

    @property
    def tokens_per_pair(self) -> int:
        """The text and visual tokens of one pair."""
        ...


P = TypeVar("P", bound=Batchable)


@dataclass(slots=True)
class _Bucket(Generic[P]):
    heap: list[tuple[int, float, P]] = field(default_factory=list)  # rank, time at which it became ready, piece
    num_pairs: int = 0
    num_tokens: int = 0

    def oldest(self) -> float:
        return min(since for _, since, _ in self.heap)


class MicroBatcher(Generic[P]):
    """Collects ready pieces by length bucket, and groups them into batches."""

    def __init__(self, *, max_tokens: int, max_pairs: int, max_wait_s: float) -> None:
        self.max_tokens = max_tokens
        self._max_pairs = max_pairs
        self._max_wait_s = max_wait_s
        self._buckets: dict[int, _Bucket[P]] = {}

    @property
    def num_pairs(self) -> int:
        return sum(bucket.num_pairs for bucket in self._buckets.values())

    def add(self, piece: P, rank: int, now: float) -> None:
        """Add a piece whose tokens are all in the slab. Ranks are distinct; the smallest goes first."""
        bucket = self._buckets.setdefault(piece.bucket, _Bucket())
        heapq.heappush(bucket.heap, (rank, now, piece))
        bucket.num_pairs += piece.num_pairs
        bucket.num_tokens += piece.num_pairs * piece.tokens_per_pair

    def take(self, now: float, *, more_is_coming: bool) -> list[P]:
        """Return the next batch, or an empty list while waiting may fill the batch.

        A bucket becomes a batch when it is full, when its oldest piece has waited long enough, or at once if no piece
        for it is being fetched. Of several such buckets, the one with the smallest rank goes first.
        """
        leaving = [
            number
            for number, bucket in self._buckets.items()
            if not more_is_coming or self._is_full(bucket) or now >= bucket.oldest() + self._max_wait_s
        ]
        if not leaving:
            return []
        return self._fill(min(leaving, key=lambda number: self._buckets[number].heap[0][0]))

    def _is_full(self, bucket: _Bucket[P]) -> bool:
        return bucket.num_tokens >= self.max_tokens or bucket.num_pairs >= self._max_pairs

    def _fill(self, number: int) -> list[P]:
        batch: list[P] = []
        bucket, num_pairs, num_tokens = self._buckets[number], 0, 0
        while bucket.heap:
            piece = bucket.heap[0][2]
            pairs, tokens = piece.num_pairs, piece.num_pairs * piece.tokens_per_pair
            if batch and (num_pairs + pairs > self._max_pairs or num_tokens + tokens > self.max_tokens):
                break
            heapq.heappop(bucket.heap)
            batch.append(piece)
            num_pairs += pairs
            num_tokens += tokens
        bucket.num_pairs -= num_pairs
        bucket.num_tokens -= num_tokens
        if not bucket.heap:
            del self._buckets[number]
        return batch

    def wants_turn_in_s(self, now: float) -> float | None:
        """Return the seconds until the oldest piece has waited long enough, None without pieces."""
        if not self._buckets:
            return None
        oldest = min(bucket.oldest() for bucket in self._buckets.values())
        return max(0.0, oldest + self._max_wait_s - now)

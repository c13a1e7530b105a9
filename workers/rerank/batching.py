"""Groups ready pieces of requests into micro-batches for the engine.

Decides what goes together and when; knows nothing of Kafka, tensors or the clock. A batch holds pieces of one length
bucket, so that padding is at most a bucket's width, and is filled in rank order up to a budget of tokens and pairs.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from workers.rerank.fairness import Rank

#: Text lengths are rounded up to a multiple of this: at 18 + 64 tokens a bucket pads by less than 5 % on average.
BUCKET_TOKENS = 8


class Batchable(Protocol):
    """What the batcher reads of a piece."""

    @property
    def num_pairs(self) -> int: ...

    @property
    def tokens_per_pair(self) -> int:
        """Text and visual tokens of the longest pair."""
        ...


P = TypeVar("P", bound=Batchable)


def bucket_of(num_text_tokens: int) -> int:
    """The padded text length of the bucket that a text of this length falls into."""
    return -(-num_text_tokens // BUCKET_TOKENS) * BUCKET_TOKENS


@dataclass(slots=True)
class _Bucket(Generic[P]):
    heap: list[tuple[Rank, float, P]] = field(default_factory=list)  # rank, when it became ready, piece
    num_pairs: int = 0
    num_tokens: int = 0

    def oldest(self) -> float:
        return min(since for _, since, _ in self.heap)


class MicroBatcher(Generic[P]):
    """Ready pieces, by bucket."""

    def __init__(self, *, max_tokens: int, max_pairs: int, max_wait_s: float) -> None:
        self.max_tokens = max_tokens
        self._max_pairs = max_pairs
        self._max_wait_s = max_wait_s
        self._buckets: dict[int, _Bucket[P]] = {}

    @property
    def num_pairs(self) -> int:
        return sum(bucket.num_pairs for bucket in self._buckets.values())

    def add(self, piece: P, bucket: int, rank: Rank, now: float) -> None:
        """Enter a piece whose tokens are all in the slab."""
        entry = self._buckets.setdefault(bucket, _Bucket())
        heapq.heappush(entry.heap, (rank, now, piece))
        entry.num_pairs += piece.num_pairs
        entry.num_tokens += piece.num_pairs * piece.tokens_per_pair

    def take(self, now: float, *, more_is_coming: bool) -> list[P]:
        """Return the next batch, or an empty list while it pays to wait.

        A bucket leaves when it is full, when its oldest piece has waited long enough, or at once when nothing that
        could join it is on its way. Among those that may leave, the one with the first rank goes.
        """
        leaving = [
            number
            for number, bucket in self._buckets.items()
            if not more_is_coming or self._is_full(bucket) or now >= bucket.oldest() + self._max_wait_s
        ]
        if not leaving:
            return []
        number = min(leaving, key=lambda candidate: self._buckets[candidate].heap[0][0])
        return self._fill(number)

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
        """Seconds until a bucket's oldest piece has waited long enough, None when nothing waits."""
        if not self._buckets:
            return None
        oldest = min(bucket.oldest() for bucket in self._buckets.values())
        return max(0.0, oldest + self._max_wait_s - now)

"""Ranks of the positives to one value per query: recall, reciprocal rank, nDCG.

Knows nothing of scores, of images and of how the ranks came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RECALL_CUTOFFS = (1, 5, 10)
NDCG_CUTOFF = 10


@dataclass(frozen=True, slots=True)
class PositiveRanks:
    """Where the positives of each query ended up, best is 0; every query has at least one."""

    num_queries: int
    query_index: NDArray[np.int64]  # (positives,)
    rank: NDArray[np.int64]  # (positives,)

    def best(self) -> NDArray[np.int64]:
        """The rank of each query's best positive: (queries,)."""
        best = np.full(self.num_queries, np.iinfo(np.int64).max)
        np.minimum.at(best, self.query_index, self.rank)
        return best


def recall_at(ranks: PositiveRanks, cutoff: int) -> NDArray[np.float64]:
    """1 where *any* positive is among the first `cutoff`, as published: (queries,)."""
    return (ranks.best() < cutoff).astype(np.float64)


def reciprocal_rank(ranks: PositiveRanks) -> NDArray[np.float64]:
    """1 over the place, counted from 1, of the best positive: (queries,)."""
    return 1.0 / (ranks.best() + 1)


def ndcg_at(ranks: PositiveRanks, cutoff: int) -> NDArray[np.float64]:
    """Gain of the positives among the first `cutoff`, over the gain had they all come first: (queries,)."""
    discounts = 1.0 / np.log2(np.arange(2, cutoff + 2))
    gains = np.where(ranks.rank < cutoff, discounts[np.minimum(ranks.rank, cutoff - 1)], 0.0)
    gained = np.bincount(ranks.query_index, weights=gains, minlength=ranks.num_queries)
    num_positives = np.bincount(ranks.query_index, minlength=ranks.num_queries)
    ideal = np.concatenate(([0.0], np.cumsum(discounts)))[np.minimum(num_positives, cutoff)]
    return gained / ideal


def metric_names(k: int) -> list[str]:
    """What `metric_columns` holds, in its order; R@k is among it because it must not change."""
    return [*(f"R@{cutoff}" for cutoff in _cutoffs(k)), "MRR", f"nDCG@{NDCG_CUTOFF}"]


def metric_columns(ranks: PositiveRanks, k: int) -> NDArray[np.float64]:
    """Every metric of every query: (queries, metrics)."""
    columns = [recall_at(ranks, cutoff) for cutoff in _cutoffs(k)]
    return np.stack([*columns, reciprocal_rank(ranks), ndcg_at(ranks, NDCG_CUTOFF)], axis=1)


def _cutoffs(k: int) -> Sequence[int]:
    return sorted({*RECALL_CUTOFFS, k})

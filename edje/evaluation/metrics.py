"""Ranking metrics, one value per query: recall, reciprocal rank, nDCG, average precision.

Computed from the ranks of the positives alone; knows neither scores nor images.
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
    """The ranks of each query's positives, the best rank being 0; every query has at least one positive."""

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
    """1 over the rank of the best positive, the first rank being 1: (queries,)."""
    return 1.0 / (ranks.best() + 1)


def ndcg_at(ranks: PositiveRanks, cutoff: int) -> NDArray[np.float64]:
    """The discounted gain of the positives among the first `cutoff`, divided by the highest possible: (queries,)."""
    discounts = 1.0 / np.log2(np.arange(2, cutoff + 2))
    gains = np.where(ranks.rank < cutoff, discounts[np.minimum(ranks.rank, cutoff - 1)], 0.0)
    gained = np.bincount(ranks.query_index, weights=gains, minlength=ranks.num_queries)
    num_positives = np.bincount(ranks.query_index, minlength=ranks.num_queries)
    ideal = np.concatenate(([0.0], np.cumsum(discounts)))[np.minimum(num_positives, cutoff)]
    return gained / ideal


def average_precision(ranks: PositiveRanks) -> NDArray[np.float64]:
    """The mean over the positives of the precision at their ranks: (queries,)."""
    order = np.lexsort((ranks.rank, ranks.query_index))
    queries, rank = ranks.query_index[order], ranks.rank[order]
    num_positives = np.bincount(queries, minlength=ranks.num_queries)
    num_before = np.arange(len(queries)) - np.repeat(np.cumsum(num_positives) - num_positives, num_positives)
    precision = (num_before + 1) / (rank + 1)
    return np.bincount(queries, weights=precision, minlength=ranks.num_queries) / num_positives


def metric_names(k: int) -> list[str]:
    """The names of the columns of `metric_columns`. R@k is one of them because reranking must not change it."""
    return [*(f"R@{cutoff}" for cutoff in _cutoffs(k)), "MRR", f"nDCG@{NDCG_CUTOFF}"]


def metric_columns(ranks: PositiveRanks, k: int) -> NDArray[np.float64]:
    """Every metric of every query: (queries, metrics)."""
    columns = [recall_at(ranks, cutoff) for cutoff in _cutoffs(k)]
    return np.stack([*columns, reciprocal_rank(ranks), ndcg_at(ranks, NDCG_CUTOFF)], axis=1)


def _cutoffs(k: int) -> Sequence[int]:
    return sorted({*RECALL_CUTOFFS, k})

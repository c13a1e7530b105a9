"""A cascade of two scorers: a cheap one scores every candidate, a full one only the best few.

Knows nothing of models; the result is a scorer like its two stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.evaluation.protocol import Scorer, checked_scores


@dataclass(frozen=True, slots=True)
class Cascade:
    """A scorer that gives the `budget` best candidates of each query, by `cheap`, the scores of `full`.

    The other candidates follow in the order of their cheap scores, at even steps below the lowest full score. (Cheap
    scores are not shifted below the full scores, because rounding could change their order.) With a budget of 0 all
    scores are cheap scores, with a budget of at least k all are full scores.
    """

    cheap: Scorer
    full: Scorer
    budget: int

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"a budget of {self.budget} pairs per query: it must be 0 or more")

    def __call__(self, query_index: NDArray[np.int64], candidate_index: NDArray[np.int64], /) -> NDArray[np.float32]:
        cheap = checked_scores(self.cheap, query_index, candidate_index)
        if self.budget == 0 or not cheap.size:
            return cheap
        group, rank = _ranks(query_index, cheap)
        chosen = rank < self.budget
        scores = np.empty_like(cheap)
        scores[chosen] = checked_scores(self.full, query_index[chosen], candidate_index[chosen])
        lowest = np.full(group.max() + 1, np.inf, np.float32)
        np.minimum.at(lowest, group[chosen], scores[chosen])
        rest = ~chosen
        floor = lowest[group[rest]]
        # A step is at least 1, and larger where float32 rounds 1 away; the steps may cross the next power of two.
        step = np.maximum(np.float32(1.0), 4 * np.spacing(np.abs(floor)))
        scores[rest] = floor - step * (rank[rest] - self.budget + 1).astype(np.float32)
        return scores


def _ranks(query_index: NDArray[np.int64], scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each pair's query, numbered from 0, and the pair's rank among its query's pairs, best 0, ties in order."""
    _, group = np.unique(query_index, return_inverse=True)
    order = np.lexsort((-scores, group))  # stable
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(scores), np.int64)
    rank[order] = np.arange(len(scores)) - starts[group[order]]
    return group, rank

"""The published protocol: the first stage orders all candidates, a scorer reorders its best k.

A reranked ranking is those k by score, then the rest in the first stage's order. Ties keep the first stage's order.
Knows nothing of models: it takes any scorer of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edje.evaluation.errors import RecallChanged, ScoresUnusable
from edje.evaluation.metrics import PositiveRanks, recall_at
from edje.evaluation.task import RetrievalTask, refuse_depth

#: Pairs in one call of a scorer, unless a single query has more: enough to fill the batches of every scorer.
PAIRS_PER_CALL = 2_048
#: Number of similarities that are sorted at once: 32 MB of indices.
_CHUNK_VALUES = 4_000_000


class Scorer(Protocol):
    """A function that scores pairs: a model in torch, a graph in ONNX Runtime, an engine, a table.

    `scorer(query_index, candidate_index)` takes two int64 arrays `(P,)` and returns one float32 score per pair, higher
    is better, comparable among the candidates of one query. A call holds *all* candidates of each of its queries,
    query after query, the candidates of a query in the first stage's order.
    """

    def __call__(
        self, query_index: NDArray[np.int64], candidate_index: NDArray[np.int64], /
    ) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class FirstStage:
    """The first stage's ranking of a task."""

    top: NDArray[np.int64]  # (queries, k) candidates, best first
    positives: NDArray[np.int64]  # (positives,) candidates
    ranks: PositiveRanks  # of the positives, among all candidates


def swapped(scorer: Scorer) -> Scorer:
    """The same scorer with its arguments exchanged: a scorer of (caption, image) pairs takes (image, caption) pairs."""

    def score(query_index: NDArray[np.int64], candidate_index: NDArray[np.int64]) -> NDArray[np.float32]:
        return scorer(candidate_index, query_index)

    return score


def checked_scores(
    scorer: Scorer, query_index: NDArray[np.int64], candidate_index: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The scores of a call. Raises `ScoresUnusable` unless the scorer returns one finite score per pair."""
    scores = np.asarray(scorer(query_index, candidate_index))
    if scores.shape != query_index.shape or not np.issubdtype(scores.dtype, np.floating):
        raise ScoresUnusable(
            f"the scorer returned {scores.dtype} of shape {scores.shape} for {len(query_index)} pairs; "
            "expected one float32 per pair"
        )
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        pair = bad[0]
        raise ScoresUnusable(
            f"the score of query {query_index[pair]} with candidate {candidate_index[pair]} is {scores[pair]}, "
            f"which cannot be ranked ({bad.size} such scores in this call)"
        )
    return scores


def first_stage(task: RetrievalTask, k: int) -> FirstStage:
    """All candidates ordered by similarity. Raises `TaskInvalid` for a k that exceeds the candidates."""
    refuse_depth(k, task.num_candidates)
    by_query = np.argsort(task.positive_query, kind="stable")
    queries, candidates = task.positive_query[by_query], task.positive_candidate[by_query]
    top = np.empty((task.num_queries, k), np.int64)
    ranks = np.empty(len(queries), np.int64)
    step = max(1, _CHUNK_VALUES // task.num_candidates)
    for start in range(0, task.num_queries, step):
        order = np.argsort(-task.similarity[start : start + step], axis=1, kind="stable")
        top[start : start + step] = order[:, :k]
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(task.num_candidates), order.shape), axis=1)
        first, last = np.searchsorted(queries, [start, start + len(order)])
        ranks[first:last] = rank[queries[first:last] - start, candidates[first:last]]
    return FirstStage(top, candidates, PositiveRanks(task.num_queries, queries, ranks))


def score_top(
    scorer: Scorer, top: NDArray[np.int64], *, on_progress: Callable[[int], None] = lambda num_queries: None
) -> NDArray[np.float32]:
    """The scores of `(queries, k)` candidates. Calls `on_progress` with the number of queries that were just scored."""
    num_queries, k = top.shape
    scores = np.empty(top.shape, np.float32)
    step = max(1, PAIRS_PER_CALL // k)
    for start in range(0, num_queries, step):
        some = top[start : start + step]
        queries = np.repeat(np.arange(start, start + len(some)), k)
        scores[start : start + step] = checked_scores(scorer, queries, some.ravel()).reshape(some.shape)
        on_progress(len(some))
    return scores


def reorder(top: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """`(queries, k)` candidates ordered by their `(queries, k)` scores, best first; ties keep their order."""
    return np.take_along_axis(top, np.argsort(-scores, axis=1, kind="stable"), axis=1)


def ranks_after(before: FirstStage, new_top: NDArray[np.int64]) -> PositiveRanks:
    """The ranks of the positives when `(queries, k)` candidates come first and the others keep their order.

    Does not check that `new_top` is a permutation; `refuse_changed_recall` finds one that is not, such as a reply with
    a candidate too many.
    """
    k = new_top.shape[1]
    ranks = before.ranks
    found = new_top[ranks.query_index] == before.positives[:, None]
    after = np.where(found.any(axis=1), found.argmax(axis=1), np.maximum(ranks.rank, k))
    return PositiveRanks(ranks.num_queries, ranks.query_index, after)


def refuse_changed_recall(before: PositiveRanks, after: PositiveRanks, k: int) -> None:
    """Raise `RecallChanged` if R@k of any query changed: reordering k candidates cannot change it."""
    hits_before, hits_after = recall_at(before, k), recall_at(after, k)
    changed = np.flatnonzero(hits_before != hits_after)
    if changed.size:
        raise RecallChanged(
            f"R@{k} is {hits_before.mean():.4f} before reranking the best {k} and {hits_after.mean():.4f} after "
            f"({changed.size} queries differ, the first is query {changed[0]}): reordering {k} candidates cannot "
            "change it, so one of the two rankings is wrong"
        )

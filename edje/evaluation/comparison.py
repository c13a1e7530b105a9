"""Compares first stage and reranking: every metric before and after, and their difference, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.calibration import Direction
from edje.evaluation.bootstrap import NUM_RESAMPLES, Interval, bootstrap_intervals
from edje.evaluation.metrics import metric_columns, metric_names
from edje.evaluation.protocol import (
    FirstStage,
    Scorer,
    first_stage,
    ranks_after,
    refuse_changed_recall,
    reorder,
    score_top,
)
from edje.evaluation.task import RetrievalTask


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric before and after reranking; `difference` is after minus before, of the same resamples."""

    metric: str
    first_stage: Interval
    reranked: Interval
    difference: Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """All metrics of one direction at one k."""

    direction: Direction
    k: int
    num_queries: int
    num_candidates: int
    rows: tuple[MetricRow, ...]
    better: Interval  # share of queries whose best positive rises by reranking
    worse: Interval  # share of queries whose best positive falls

    def row(self, metric: str) -> MetricRow:
        """The row of a metric, such as `R@1`. Raises `KeyError`."""
        for row in self.rows:
            if row.metric == metric:
                return row
        raise KeyError(f"no {metric} among {', '.join(row.metric for row in self.rows)}")


def evaluate(
    task: RetrievalTask,
    scorer: Scorer,
    k: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda num_queries: None,
) -> Comparison:
    """Rerank the first stage's best k of every query and compare both rankings. Raises `EvaluationError`."""
    [comparison] = evaluate_depths(task, scorer, [k], num_resamples=num_resamples, seed=seed, on_progress=on_progress)
    return comparison


def evaluate_depths(
    task: RetrievalTask,
    scorer: Scorer,
    depths: Sequence[int],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda num_queries: None,
) -> list[Comparison]:
    """As `evaluate` at several k, scoring each pair once.

    Only for a scorer whose scores depend on the pair alone; those of a cascade depend on the whole list.
    """
    before = first_stage(task, max(depths))
    scores = score_top(scorer, before.top, on_progress=on_progress)
    return [compare(task, before, scores[:, :k], num_resamples=num_resamples, seed=seed) for k in depths]


def compare(
    task: RetrievalTask,
    before: FirstStage,
    scores: NDArray[np.float32],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare a first stage with its ranking after `(queries, k)` scores of its best k."""
    k = scores.shape[1]
    after = ranks_after(before, reorder(before.top[:, :k], scores))
    refuse_changed_recall(before.ranks, after, k)
    rows, better, worse = compare_columns(
        metric_names(k),
        metric_columns(before.ranks, k),
        metric_columns(after, k),
        np.sign(before.ranks.best() - after.best()),
        task.cluster,
        num_resamples=num_resamples,
        seed=seed,
    )
    return Comparison(task.direction, k, task.num_queries, task.num_candidates, rows, better, worse)


def compare_columns(
    names: Sequence[str],
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    change: NDArray[np.integer],
    cluster: NDArray[np.int64],
    *,
    num_resamples: int,
    seed: int,
) -> tuple[tuple[MetricRow, ...], Interval, Interval]:
    """Compare `(queries, metrics)` values: a row per metric, and the shares of queries that got better and worse.

    `change` (queries,) is 1 for a query that got better, -1 for one that got worse, else 0.
    """
    changes = np.stack((change > 0, change < 0), axis=1).astype(np.float64)
    columns = np.concatenate((before, after, after - before, changes), axis=1)
    intervals = bootstrap_intervals(columns, cluster, num_resamples=num_resamples, seed=seed)
    num = len(names)
    rows = zip(names, intervals[:num], intervals[num : 2 * num], intervals[2 * num : 3 * num], strict=True)
    return tuple(MetricRow(*row) for row in rows), intervals[-2], intervals[-1]

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
    names = metric_names(k)
    first, second = metric_columns(before.ranks, k), metric_columns(after, k)
    intervals = bootstrap_intervals(
        np.concatenate((first, second, second - first), axis=1), task.cluster, num_resamples=num_resamples, seed=seed
    )
    rows = zip(
        names, intervals[: len(names)], intervals[len(names) : 2 * len(names)], intervals[2 * len(names) :], strict=True
    )
    return Comparison(task.direction, k, task.num_queries, task.num_candidates, tuple(MetricRow(*row) for row in rows))

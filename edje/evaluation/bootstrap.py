"""Confidence intervals by bootstrap over clusters of queries.

Five captions of one image are not five independent queries, so images are drawn, not captions. All columns share the
draws: the interval of a difference is that of the paired difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1_000
CONFIDENCE = 0.95
#: Number of random draws in memory at once: 16 MB.
_CHUNK_DRAWS = 2_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic and its confidence limits, which are percentiles of its resamples."""

    value: float
    low: float
    high: float


def bootstrap_intervals(
    columns: NDArray[np.float64],
    cluster: NDArray[np.int64],
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> list[Interval]:
    """The interval of each column's mean, from `(queries, columns)` values and the `(queries,)` clusters of queries.

    The same seed gives the same intervals.
    """
    sums, sizes = cluster_sums(columns, cluster)
    means = [(times @ sums) / (times @ sizes)[:, None] for times in cluster_draws(len(sizes), num_resamples, seed)]
    return intervals(columns.mean(axis=0), np.concatenate(means), confidence)


def cluster_sums(
    columns: NDArray[np.float64], cluster: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The sum of each column over each cluster, `(clusters, columns)`, and the number of rows of each cluster."""
    _, numbers = np.unique(cluster, return_inverse=True)
    num_clusters = int(numbers.max()) + 1
    sums = np.zeros((num_clusters, columns.shape[1]))
    np.add.at(sums, numbers, columns)
    return sums, np.bincount(numbers, minlength=num_clusters)


def cluster_draws(num_clusters: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each resample draws each cluster: `(some resamples, clusters)` arrays until all resamples are drawn.

    A resample draws as many clusters as there are, with replacement. Raises `ValueError` for no resamples.
    """
    if num_resamples < 1:
        raise ValueError(f"{num_resamples} resamples give no interval: choose 1 or more")
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK_DRAWS // num_clusters)
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        drawn = generator.integers(num_clusters, size=(rows, num_clusters))
        drawn += num_clusters * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * num_clusters).reshape(rows, num_clusters).astype(np.float64)


def intervals(
    values: NDArray[np.float64], resampled: NDArray[np.float64], confidence: float = CONFIDENCE
) -> list[Interval]:
    """The intervals of `(statistics,)` values from their `(resamples, statistics)` resampled values.

    Raises `ValueError` for a confidence outside 0 to 1.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence of {confidence} gives no interval: choose one between 0 and 1")
    tail = (1.0 - confidence) / 2
    lows, highs = np.quantile(resampled, [tail, 1.0 - tail], axis=0)
    return [Interval(float(v), float(low), float(high)) for v, low, high in zip(values, lows, highs, strict=True)]

"""Intervals by resampling, in clusters: what could as well have come out with other images of the same kind.

Five captions of one picture are not five independent queries, so pictures are drawn and not captions. Columns are
resampled together: the interval of a difference is that of the paired difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 1_000
CONFIDENCE = 0.95
#: Drawn numbers held at a time: 16 MB.
_CHUNK_DRAWS = 2_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the percentiles between which its resamples lie."""

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
    """`(queries, columns)` values and each query's cluster -> one interval per column; the same seed, the same ones."""
    if num_resamples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(f"{num_resamples} resamples at confidence {confidence} give no interval")
    _, numbers = np.unique(cluster, return_inverse=True)
    num_clusters = int(numbers.max()) + 1
    sums = np.zeros((num_clusters, columns.shape[1]))
    np.add.at(sums, numbers, columns)
    sizes = np.bincount(numbers, minlength=num_clusters)
    means = _resampled_means(sums, sizes, num_resamples, np.random.default_rng(seed))
    tail = (1.0 - confidence) / 2
    lows, highs = np.quantile(means, [tail, 1.0 - tail], axis=0)
    values = columns.mean(axis=0)
    return [Interval(float(v), float(low), float(high)) for v, low, high in zip(values, lows, highs, strict=True)]


def _resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.int64], num_resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples, columns): means over as many clusters as there are, drawn with replacement."""
    num_clusters = len(sizes)
    means = np.empty((num_resamples, sums.shape[1]))
    step = max(1, _CHUNK_DRAWS // num_clusters)
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        drawn = generator.integers(num_clusters, size=(rows, num_clusters))
        drawn += num_clusters * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * num_clusters).reshape(rows, num_clusters).astype(np.float64)
        means[start : start + rows] = (times @ sums) / (times @ sizes)[:, None]
    return means

"""Measures how reliable relevance scores are as probabilities: calibration error, Brier score, log loss, AP.

Computed from log-odds and labels of pairs; knows neither models nor how the log-odds were calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.calibration import sigmoid
from edje.evaluation.bootstrap import NUM_RESAMPLES, Interval, cluster_draws, cluster_sums, intervals

#: Bins of equal width, as in Guo et al. (arXiv 1706.04599).
NUM_BINS = 15
#: Number of resampled pairs in memory at once: 32 MB.
_CHUNK_PAIRS = 4_000_000


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The pairs whose probability lies in one bin."""

    num_pairs: int
    mean_probability: float
    positive_share: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """The figures of one direction at one k, over all pairs of a query with one of its k candidates."""

    num_pairs: int
    positive_share: float
    calibration_error: Interval  # expected: the mean over pairs of |mean probability - positive share| of their bin
    brier_score: Interval
    log_loss: Interval
    average_precision: Interval  # of all pairs in one ranking by probability
    bins: tuple[ReliabilityBin, ...]  # of equal width, from 0 to 1; bins without pairs are left out


def reliability(
    log_odds: NDArray[np.floating],
    is_positive: NDArray[np.bool_],
    cluster: NDArray[np.int64],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Reliability:
    """The reliability of `(queries, k)` log-odds with these positives.

    Queries are resampled by their `(queries,)` clusters.
    """
    k = log_odds.shape[1]
    odds, labels = log_odds.ravel().astype(np.float64), is_positive.ravel().astype(np.float64)
    pair_cluster = np.repeat(cluster, k)
    probabilities = sigmoid(odds)
    bin_of = np.minimum((probabilities * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    in_bin = np.zeros((len(odds), 3 * NUM_BINS))
    for offset, values in enumerate((np.ones_like(odds), probabilities, labels)):
        in_bin[np.arange(len(odds)), offset * NUM_BINS + bin_of] = values
    losses = np.stack((_brier(probabilities, labels), _log_loss(odds, labels)), axis=1)
    columns = np.concatenate((losses, in_bin), axis=1)
    sums, sizes = cluster_sums(columns, pair_cluster)
    ranking = _Ranking(odds, labels, np.unique(pair_cluster, return_inverse=True)[1])
    resampled = [
        _statistics(times @ sums, times @ sizes, ranking.average_precision(times))
        for times in cluster_draws(len(sizes), num_resamples, seed)
    ]
    once = np.ones((1, len(sizes)))
    values = _statistics(once @ sums, once @ sizes, ranking.average_precision(once))[0]
    error, brier, loss, precision = intervals(values, np.concatenate(resampled))
    counts, predicted, observed = np.split(columns.sum(axis=0)[2:], 3)
    bins = tuple(
        ReliabilityBin(int(count), float(total / count), float(positives / count))
        for count, total, positives in zip(counts, predicted, observed, strict=True)
        if count
    )
    return Reliability(len(odds), float(labels.mean()), error, brier, loss, precision, bins)


def _brier(probabilities: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.float64]:
    difference: NDArray[np.float64] = (probabilities - labels) ** 2
    return difference


def _log_loss(log_odds: NDArray[np.float64], labels: NDArray[np.float64]) -> NDArray[np.float64]:
    loss: NDArray[np.float64] = np.logaddexp(0.0, log_odds) - labels * log_odds
    return loss


def _statistics(
    sums: NDArray[np.float64], num_pairs: NDArray[np.float64], average_precision: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(resamples, 4): calibration error, Brier score, log loss, average precision, from each resample's sums."""
    _, predicted, observed = np.split(sums[:, 2:], 3, axis=1)
    error = np.abs(predicted - observed).sum(axis=1) / num_pairs
    return np.stack((error, sums[:, 0] / num_pairs, sums[:, 1] / num_pairs, average_precision), axis=1)


class _Ranking:
    """All pairs by falling log-odds, for the average precision of resamples."""

    def __init__(self, log_odds: NDArray[np.float64], labels: NDArray[np.float64], cluster: NDArray[np.int64]) -> None:
        order = np.argsort(-log_odds, kind="stable")
        self._labels, self._cluster = labels[order], cluster[order]

    def average_precision(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (resamples,) values; `times` (resamples, clusters) counts draws. 0 without positives."""
        step = max(1, _CHUNK_PAIRS // len(self._labels))
        parts = [self._of_some(times[start : start + step]) for start in range(0, len(times), step)]
        return np.concatenate(parts)

    def _of_some(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = times[:, self._cluster]
        positives = weights * self._labels
        num_before = np.maximum(np.cumsum(weights, axis=1), 1.0)
        precision = np.cumsum(positives, axis=1) / num_before
        values: NDArray[np.float64] = (positives * precision).sum(axis=1) / np.maximum(positives.sum(axis=1), 1.0)
        return values

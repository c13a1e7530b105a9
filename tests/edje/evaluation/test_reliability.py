"""Calibration error, Brier score, log loss and average precision of pairs, compared with plain implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.calibration import sigmoid
from edje.evaluation.reliability import NUM_BINS, reliability

shapes = st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**31))


def drawn(num_queries, k, seed, slope=1.0):
    """Log-odds, and positives that have these log-odds times the slope."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(-1, 2, (num_queries, k))
    return log_odds, rng.random((num_queries, k)) < sigmoid(slope * log_odds)


@settings(deadline=None)
@given(shapes)
def test_the_figures_equal_those_of_plain_loops(shape):
    log_odds, positives = drawn(*shape)
    pairs = sorted(zip(sigmoid(log_odds).ravel(), positives.ravel(), strict=True), key=lambda pair: -pair[0])

    figures = reliability(log_odds, positives, np.arange(len(log_odds)), num_resamples=2)

    num = len(pairs)
    assert figures.num_pairs == num
    assert figures.brier_score.value == pytest.approx(sum((p - y) ** 2 for p, y in pairs) / num)
    assert figures.log_loss.value == pytest.approx(-sum(math.log(p if y else 1 - p) for p, y in pairs) / num)
    bins = [[(p, y) for p, y in pairs if int(p * NUM_BINS) == number] for number in range(NUM_BINS)]
    errors = [abs(sum(p for p, _ in one) - sum(y for _, y in one)) for one in bins]
    assert figures.calibration_error.value == pytest.approx(sum(errors) / num)
    assert [each.num_pairs for each in figures.bins] == [len(one) for one in bins if one]
    precisions = [sum(y for _, y in pairs[: rank + 1]) / (rank + 1) for rank in range(num) if pairs[rank][1]]
    assert figures.average_precision.value == pytest.approx(sum(precisions) / max(1, len(precisions)))


def test_probabilities_that_drew_the_labels_have_a_small_error_within_a_small_interval():
    figures = reliability(*drawn(4000, 5, 0), np.arange(4000), num_resamples=100)

    assert figures.calibration_error.value < 0.01
    assert figures.calibration_error.low <= figures.calibration_error.high < 0.02
    for each in figures.bins:
        assert each.positive_share == pytest.approx(each.mean_probability, abs=0.06)


def test_probabilities_that_are_too_sure_have_a_large_error():
    log_odds, positives = drawn(2000, 5, 0)

    assert reliability(5 * log_odds, positives, np.arange(2000), num_resamples=2).calibration_error.value > 0.1


def test_extreme_log_odds_give_finite_figures():
    log_odds = np.array([[1e4, -1e4], [-1e4, 1e4]])

    figures = reliability(log_odds, np.eye(2, dtype=bool), np.arange(2), num_resamples=3)

    assert figures.calibration_error.value == 0
    assert figures.log_loss.value == 0
    assert figures.average_precision.value == 1
    assert [(each.mean_probability, each.positive_share) for each in figures.bins] == [(0.0, 0.0), (1.0, 1.0)]


def test_pairs_without_a_positive_have_an_average_precision_of_zero():
    figures = reliability(np.zeros((3, 2)), np.zeros((3, 2), bool), np.arange(3), num_resamples=3)

    assert figures.average_precision.value == 0
    assert figures.positive_share == 0


def test_queries_of_one_cluster_are_resampled_together():
    log_odds, positives = drawn(100, 3, 1)

    together = reliability(log_odds, positives, np.zeros(100, int), num_resamples=20)

    assert together.brier_score.low == pytest.approx(together.brier_score.value)
    assert together.average_precision.high == pytest.approx(together.average_precision.value)


def test_resampling_in_parts_gives_the_same_intervals(monkeypatch):
    log_odds, positives = drawn(30, 4, 2)
    whole = reliability(log_odds, positives, np.arange(30), num_resamples=40)

    monkeypatch.setattr("edje.evaluation.reliability._CHUNK_PAIRS", 300)

    assert reliability(log_odds, positives, np.arange(30), num_resamples=40) == whole

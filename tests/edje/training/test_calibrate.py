"""Fitting a calibration: the weight of the first stage, the temperature and the offset."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.calibration import DirectionCalibration, log_odds, sigmoid
from edje.evaluation.task import text_to_image
from edje.first_stage_scores import of_ranks
from edje.training.calibrate import calibrate, fit

NUM_QUERIES, K = 2000, 10
RANKS = of_ranks(np.arange(1, K + 1))


def drawn(logit_weight=1.0, prior_weight=1.0, seed=0):
    """Logits and positives of queries with one positive each, drawn by softmax of the weighted logits and ranks."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(NUM_QUERIES, K)) * 2
    scores = logit_weight * logits + prior_weight * RANKS
    gumbel = rng.gumbel(size=scores.shape)
    is_positive = np.arange(K) == (scores + gumbel).argmax(axis=1)[:, None]
    return logits.astype(np.float32), is_positive


def recall(logits, is_positive, gain):
    best = (logits + gain * RANKS).argmax(axis=1)
    return is_positive[np.arange(len(best)), best].mean()


def probabilities(logits, calibration):
    return sigmoid(log_odds(logits, np.broadcast_to(RANKS, logits.shape), calibration))


def error_of(probability, is_positive):
    """The expected calibration error with ten bins."""
    bins = np.minimum((probability * 10).astype(int), 9).ravel()
    difference = np.bincount(bins, (probability - is_positive).ravel(), 10)
    return np.abs(difference).sum() / probability.size


@pytest.mark.parametrize(("logit_weight", "prior_weight"), [(1.0, 1.0), (0.5, 1.5), (1.5, 0.5)])
def test_the_gain_is_the_ratio_of_the_weights_that_drew_the_positives(logit_weight, prior_weight):
    calibration = fit(*drawn(logit_weight, prior_weight))

    assert calibration.first_stage_gain == pytest.approx(prior_weight / logit_weight, rel=0.25)


def test_a_useful_first_stage_raises_recall_over_either_part_alone():
    logits, is_positive = drawn()

    gain = fit(logits, is_positive).first_stage_gain

    assert recall(logits, is_positive, gain) > recall(logits, is_positive, 0.0) + 0.02
    assert recall(logits, is_positive, gain) > recall(logits, is_positive, 1000.0) + 0.02


def test_a_first_stage_without_information_gets_a_gain_of_zero():
    assert fit(*drawn(prior_weight=0.0)).first_stage_gain == 0.0


def test_logits_without_information_leave_the_order_to_the_first_stage():
    logits, is_positive = drawn(logit_weight=0.0, prior_weight=2.0)

    gain = fit(logits, is_positive).first_stage_gain

    assert recall(logits, is_positive, gain) > is_positive[:, 0].mean() - 0.02


@pytest.mark.parametrize("factor", [0.01, 30.0])
@pytest.mark.parametrize("shift", [-200.0, 0.0, 50.0])
def test_the_scale_and_the_level_of_the_logits_do_not_matter(factor, shift):
    logits, is_positive = drawn()
    plain = fit(logits, is_positive)

    other = fit(factor * logits + shift, is_positive)

    assert other.first_stage_gain / factor == pytest.approx(plain.first_stage_gain, rel=0.2)
    assert probabilities(factor * logits + shift, other) == pytest.approx(probabilities(logits, plain), abs=0.05)


def test_the_probabilities_are_calibrated():
    logits, is_positive = drawn()

    probability = probabilities(logits, fit(logits, is_positive))

    assert error_of(probability, is_positive) < 0.02
    assert probability.mean() == pytest.approx(is_positive.mean(), abs=1e-3)


def test_queries_without_a_positive_lower_the_probabilities():
    logits, is_positive = drawn()
    is_positive[::2] = False

    probability = probabilities(logits, fit(logits, is_positive))

    assert probability.mean() == pytest.approx(0.05, abs=2e-3)
    assert error_of(probability, is_positive) < 0.02


@pytest.mark.parametrize("value", [False, True])
def test_pairs_of_one_kind_give_a_calibration_that_keeps_the_order(value):
    logits, is_positive = drawn()

    calibration = fit(logits, np.full_like(is_positive, value))

    assert calibration.first_stage_gain == 0.0
    assert (np.argsort(probabilities(logits, calibration)[0]) == np.argsort(logits[0])).all()
    assert (probabilities(logits, calibration).mean() > 0.99) == value


def test_positives_that_all_lie_above_the_negatives_give_finite_constants():
    logits = np.zeros((50, K), np.float32)
    logits[:, 3] = 40.0

    calibration = fit(logits, logits > 0)

    assert calibration.first_stage_gain == 0.0
    assert probabilities(logits, calibration)[:, 3].min() > 0.9
    assert np.isfinite([calibration.temperature, calibration.offset]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_any_logits_give_a_valid_calibration(num_queries, k, seed, shift, scale):
    rng = np.random.default_rng(seed)
    logits = (shift + scale * rng.normal(size=(num_queries, k))).astype(np.float32)

    calibration = fit(logits, rng.random((num_queries, k)) < 0.3)

    assert isinstance(calibration, DirectionCalibration)
    assert calibration.temperature > 0
    assert np.isfinite([calibration.temperature, calibration.offset, calibration.first_stage_gain]).all()


def test_a_task_is_calibrated_on_the_first_stages_best_candidates():
    rng = np.random.default_rng(0)
    similarity = rng.random((200, 30)).astype(np.float32)
    image_of_caption = rng.integers(0, 30, 200)
    calls = []

    def scorer(captions, images):
        calls.append(len(captions))
        return (image_of_caption[captions] == images).astype(np.float32) + 0.1 * similarity[captions, images]

    calibration = calibrate(text_to_image(similarity, image_of_caption), scorer, k=5)

    assert sum(calls) == 200 * 5
    assert calibration.first_stage_gain == 0.0

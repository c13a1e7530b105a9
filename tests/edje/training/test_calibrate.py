"""How much a first-stage score counts: found on pairs that the model has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from edje.evaluation.task import text_to_image
from edje.training.calibrate import GAINS, best_gain, candidates_of
from edje.training.dev_retrieval import DevSearch

NUM_CAPTIONS, NUM_IMAGES, K = 400, 12, 6


class Logits:
    """Scorers whose joint logit is a given matrix and a share of the standardised first-stage score."""

    def __init__(self, own: np.ndarray, gain: float, mean: float, std: float) -> None:
        self._own, self._gain, self._mean, self._std = own, gain, mean, std

    def joint(self, similarity):
        return lambda captions, images: (
            self._own[captions, images] + self._gain * (similarity[captions, images] - self._mean) / self._std
        ).astype(np.float32)


def search_of(first_stage_weight, own_weight, *, gain=1.0, mean=0.0, std=1.0, seed=0):
    """Both the model's own term and the first stage know the right image, each as well as its weight says."""
    rng = np.random.default_rng(seed)
    right = rng.integers(0, NUM_IMAGES, NUM_CAPTIONS)
    positives = np.zeros((NUM_CAPTIONS, NUM_IMAGES), np.float32)
    positives[np.arange(NUM_CAPTIONS), right] = 1
    similarity = (first_stage_weight * positives + rng.normal(size=positives.shape)).astype(np.float32)
    own = (own_weight * positives + rng.normal(size=positives.shape)).astype(np.float32)
    scorers = Logits(own, gain, mean, std)
    return DevSearch(text_to_image(similarity, right), similarity, right, scorers, K)


def recall(search, gain):
    candidates = candidates_of(search)
    rows = np.repeat(np.arange(NUM_CAPTIONS), K)
    own = search.scorers._own[rows, candidates.reshape(-1)].reshape(candidates.shape)
    logits = own + gain * np.take_along_axis(search.similarity, candidates, axis=1)
    best = np.take_along_axis(candidates, logits.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float((best == search.image_of_caption).mean())


def test_a_first_stage_that_knows_something_is_given_weight_and_helps():
    search = search_of(first_stage_weight=2.0, own_weight=2.0)

    gain = best_gain(search, 1.0, 0.0, 1.0)

    assert recall(search, gain) > recall(search, 0.0) + 0.03
    assert recall(search, gain) > recall(search, 100.0) + 0.03


def test_a_model_that_is_too_sure_of_itself_is_given_as_much_of_the_first_stage_as_its_scale_asks():
    sober = search_of(first_stage_weight=2.0, own_weight=1.0)
    sure = search_of(first_stage_weight=2.0, own_weight=1.0)
    sure.scorers._own *= 30

    gain = best_gain(sure, 1.0, 0.0, 1.0)

    assert gain / 30 == pytest.approx(best_gain(sober, 1.0, 0.0, 1.0), rel=0.15)
    assert recall(sure, gain) > recall(sure, 1000.0)


def test_a_first_stage_that_knows_nothing_gets_next_to_no_weight():
    search = search_of(first_stage_weight=0.0, own_weight=3.0)

    assert best_gain(search, 1.0, 0.0, 1.0) <= 0.2


@pytest.mark.parametrize(("gain", "mean", "std"), [(1.0, 0.0, 1.0), (0.0, 0.0, 1.0), (5.0, 0.0, 1.0)])
def test_the_gain_that_is_found_does_not_depend_on_the_one_before(gain, mean, std):
    search = search_of(2.0, 2.0, gain=gain, mean=mean, std=std)

    assert best_gain(search, gain, mean, std) == best_gain(search_of(2.0, 2.0), 1.0, 0.0, 1.0)


def test_without_any_right_image_among_the_candidates_the_gain_stays():
    search = search_of(2.0, 2.0)
    wrong = np.array([next(n for n in range(NUM_IMAGES) if n not in row) for row in candidates_of(search)])
    lost = DevSearch(search.task, search.similarity, wrong, search.scorers, K)

    assert best_gain(lost, 0.7, 0.0, 1.0) == 0.7


def test_no_first_stage_at_all_is_among_the_gains():
    assert GAINS[0] == 0

"""Logits to ranks: a permutation, ties in the candidates' order, and no rank for what is not a number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edje.calibration import DirectionCalibration
from workers.rerank.ranking import NotFinite, rank

LOGITS = arrays(np.float32, st.integers(0, 50), elements=st.floats(-200, 200, width=32))


@given(LOGITS)
def test_a_ranking_is_a_permutation_best_first_with_ties_in_order(logits):
    numbers, scores, ranked = rank(logits, None, None)

    assert sorted(numbers) == list(range(len(logits)))
    keys = [(-logits[number], number) for number in numbers]
    assert keys == sorted(keys)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (np.diff(scores) <= 0).all()
    assert (ranked == logits[numbers]).all()


@given(LOGITS, st.integers(1, 60))
def test_the_top_is_the_beginning_of_the_whole_ranking(logits, top_n):
    whole = rank(logits, None, None).order

    numbers, scores, _ = rank(logits, None, top_n)

    assert list(numbers) == list(whole[:top_n])
    assert len(scores) == min(top_n, len(logits))


@given(LOGITS, st.data())
def test_only_scored_candidates_are_ranked(logits, data):
    scored = np.array(data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits))), bool)

    numbers, *_ = rank(np.where(scored, logits, np.float32("nan")), scored, None)

    assert sorted(numbers) == list(np.flatnonzero(scored))


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_logit_that_is_not_finite_is_an_error_that_names_the_candidate(bad):
    logits = np.array([1.0, 2.0, float(bad)], np.float32)

    with pytest.raises(NotFinite, match=f"logit {bad} for candidate 2"):
        rank(logits, np.array([True, False, True]), None)


def test_without_a_calibration_the_relevance_is_the_sigmoid_without_overflow():
    logits = np.array([1e30, 3.0, 0.0, -3.0, -1e30], np.float32)

    assert rank(logits, None, None).relevance == pytest.approx([1.0, 0.9525741268, 0.5, 0.0474258732, 0.0])


def test_a_calibration_gives_probabilities_in_the_order_of_the_logits():
    calibration = DirectionCalibration(temperature=2.0, offset=-1.0, first_stage_gain=0.0)

    ranking = rank(np.array([0.0, 4.0], np.float32), None, None, calibration=calibration)

    assert ranking.order.tolist() == [1, 0]
    assert ranking.relevance == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])


def test_a_calibration_with_a_gain_ranks_by_the_first_stage_too():
    calibration = DirectionCalibration(temperature=1.0, offset=0.0, first_stage_gain=3.0)
    first_stage = np.array([-2.0, 0.0, -1.0], np.float32)
    scored = np.array([True, True, False])

    ranking = rank(np.float32([1, 0, 9]), scored, None, first_stage=first_stage, calibration=calibration)

    assert ranking.order.tolist() == [1, 0]
    assert ranking.logits.tolist() == [0.0, 1.0]
    assert ranking.relevance == pytest.approx([0.5, 1 / (1 + np.exp(5))])

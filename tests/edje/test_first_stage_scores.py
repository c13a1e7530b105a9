"""Standardised first-stage scores: one result for every scale, and a defined order for every kind of bad score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.first_stage_scores import FAULT_MESSAGES, of_ranks, standardise

COSINES = [0.31, 0.29, 0.35, 0.11, 0.2]
RANKS = [2, 3, 1, 5, 4]

#: Scores far enough from each other that no transformation below makes two of them equal.
distinct_scores = st.lists(st.integers(-1000, 1000), min_size=1, max_size=30, unique=True)


def test_the_best_candidate_gets_zero_and_rank_r_minus_the_logarithm_of_r():
    standard = standardise(COSINES)

    assert standard.values == pytest.approx([-math.log(rank) for rank in RANKS])
    assert standard.values.dtype == np.float32
    assert standard.fault is None


@pytest.mark.parametrize(
    "transformed",
    [
        lambda score: 100 * score,
        lambda score: score - 7,
        lambda score: 1e9 * score,
        lambda score: math.exp(score / 100),
        lambda score: -1 / (score + 2000),
        lambda score: math.atan(score / 1000),
    ],
)
@given(distinct_scores)
def test_any_increasing_function_of_the_scores_gives_the_same_result(transformed, scores):
    plain, other = standardise(scores), standardise([transformed(score) for score in scores])

    assert other.values.tolist() == plain.values.tolist()


@given(st.lists(st.one_of(st.none(), st.floats()), max_size=30))
def test_whatever_the_scores_are_the_result_is_a_permutation_of_the_ranks(scores):
    standard = standardise(scores)

    assert sorted(standard.values.tolist(), reverse=True) == of_ranks(np.arange(1, len(scores) + 1)).tolist()


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        ([None, None, None], "missing"),
        ([math.nan, math.nan], "missing"),
        ([0.1, None, 0.3, None], "incomplete"),
        ([0.1, math.nan, 0.3], "incomplete"),
        ([0.1, math.inf, 0.3], "incomplete"),
        ([-math.inf, 0.1], "incomplete"),
        ([2.5, 2.5, 2.5], "equal"),
        ([1.0, 1.0], "equal"),
    ],
)
def test_scores_that_give_no_order_leave_the_given_order_and_name_the_fault(scores, fault):
    standard = standardise(scores)

    assert standard.fault == fault
    assert standard.values.tolist() == of_ranks(np.arange(1, len(scores) + 1)).tolist()
    assert FAULT_MESSAGES[fault]


def test_scores_that_rise_in_the_given_order_are_read_as_scores_and_reported():
    standard = standardise([0.1, 0.2, 0.3])

    assert standard.fault == "ascending"
    assert standard.values.tolist() == of_ranks(np.array([3, 2, 1])).tolist()


@pytest.mark.parametrize("scores", [[19, 18, 17], [-3.0, -1.0, -2.0], [1e9, 1e-9, 0.0], [0.2, 0.3], [5.0]])
def test_scores_in_any_range_are_no_fault(scores):
    assert standardise(scores).fault is None


def test_equal_scores_keep_the_given_order():
    assert standardise([0.1, 0.4, 0.4, 0.1]).values.tolist() == of_ranks(np.array([3, 1, 2, 4])).tolist()


def test_one_candidate_gets_zero_and_no_candidates_give_an_empty_result():
    assert standardise([0.7]).values.tolist() == [0.0]
    assert math.copysign(1, standardise([0.7]).values[0]) == 1
    assert standardise([]).values.tolist() == []
    assert standardise([]).fault is None


def test_scores_that_differ_only_beyond_single_precision_are_told_apart():
    assert standardise([1.0, 1.0 + 1e-12]).values.tolist() == of_ranks(np.array([2, 1])).tolist()

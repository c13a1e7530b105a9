"""A cascade: a cheap scorer, and a full one within a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edje.evaluation.cascade import Cascade
from edje.evaluation.errors import ScoresUnusable

#: Ties, and magnitudes at which float32 no longer tells neighbouring whole numbers apart.
SCORES = st.integers(-3, 3).map(float) | st.floats(-(2.0**90), 2.0**90, width=32)


@st.composite
def two_tables(draw):
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 8)))
    tables = arrays(np.float32, shape, elements=SCORES)
    return draw(tables), draw(tables)


def scorer_of(table, asked=None):
    def score(query_index, candidate_index):
        if asked is not None:
            asked.append((query_index, candidate_index))
        return table[query_index, candidate_index]

    return score


def pairs_of(table):
    queries, candidates = np.indices(table.shape)
    return queries.ravel(), candidates.ravel()


def ordered(scores):
    return np.argsort(-scores, axis=1, kind="stable").tolist()


@settings(deadline=None, max_examples=25)
@given(two_tables())
def test_with_a_budget_of_all_candidates_the_scores_are_the_full_scorers(tables):
    cheap, full = tables

    scores = Cascade(scorer_of(cheap), scorer_of(full), budget=full.shape[1])(*pairs_of(full))

    assert scores.tolist() == full.ravel().tolist()


@settings(deadline=None, max_examples=25)
@given(two_tables())
def test_with_a_budget_of_zero_the_scores_are_the_cheap_scorers(tables):
    cheap, full = tables
    asked = []

    scores = Cascade(scorer_of(cheap), scorer_of(full, asked), budget=0)(*pairs_of(full))

    assert scores.tolist() == cheap.ravel().tolist()
    assert asked == []


@settings(deadline=None, max_examples=120)
@given(two_tables(), st.integers(1, 8))
def test_the_best_by_cheap_score_come_first_in_the_full_order_then_the_rest_in_the_cheap_order(tables, budget):
    cheap, full = tables

    scores = Cascade(scorer_of(cheap), scorer_of(full), budget)(*pairs_of(full)).reshape(full.shape)

    expected = []
    for cheap_row, full_row in zip(cheap, full, strict=True):
        by_cheap = sorted(range(len(cheap_row)), key=lambda candidate: -cheap_row[candidate])
        finalists = sorted(sorted(by_cheap[:budget]), key=lambda candidate: -full_row[candidate])
        expected.append(finalists + by_cheap[budget:])
    assert ordered(scores) == expected


def test_the_full_scorer_is_called_once_with_the_budget_of_each_query_query_by_query():
    cheap, asked = np.array([[3, 1, 2], [1, 3, 2]], np.float32), []

    Cascade(scorer_of(cheap), scorer_of(cheap, asked), budget=2)(*pairs_of(cheap))

    [(queries, candidates)] = asked
    assert queries.tolist() == [0, 0, 1, 1]
    assert candidates.tolist() == [0, 2, 1, 2]


@pytest.mark.parametrize("bad_stage", [0, 1])
def test_the_error_for_a_score_that_is_not_finite_names_the_pair(bad_stage):
    tables = [np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)]
    tables[bad_stage][1, 0] = np.nan

    with pytest.raises(ScoresUnusable, match="query 1 with candidate 0 is nan"):
        Cascade(*map(scorer_of, tables), budget=2)(*pairs_of(tables[0]))


def test_no_pairs_have_no_scores():
    nothing = np.empty(0, np.int64)

    assert Cascade(scorer_of(np.ones((1, 1), np.float32)), scorer_of(None), 3)(nothing, nothing).shape == (0,)


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="budget of -1"):
        Cascade(scorer_of(None), scorer_of(None), -1)

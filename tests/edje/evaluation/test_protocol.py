"""The retrieval protocol and its metrics, compared with a slow implementation in plain Python."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edje.evaluation.comparison import evaluate, evaluate_depths
from edje.evaluation.errors import RecallChanged, ScoresUnusable, TaskInvalid
from edje.evaluation.metrics import PositiveRanks, metric_columns, metric_names
from edje.evaluation.protocol import (
    PAIRS_PER_CALL,
    first_stage,
    ranks_after,
    refuse_changed_recall,
    reorder,
    score_top,
    swapped,
)
from edje.evaluation.task import RetrievalTask, image_to_text, text_to_image

#: Few different values, so that ties are common.
VALUES = st.integers(-3, 3).map(float)


@st.composite
def retrievals(draw):
    """Similarities and scores of (captions, images), each caption's image, and a depth."""
    num_images = draw(st.integers(2, 9))
    extra = draw(st.lists(st.integers(0, num_images - 1), max_size=12))
    image_of_caption = np.array(draw(st.permutations([*range(num_images), *extra])))
    tables = arrays(np.float32, (len(image_of_caption), num_images), elements=VALUES)
    return draw(tables), draw(tables), image_of_caption, draw(st.integers(1, num_images))


def table_scorer(table):
    return lambda query_index, candidate_index: table[query_index, candidate_index]


def plain_metrics(similarity, scores, is_positive, k):
    """Every metric before and after reranking, by lists and loops: name -> (before, after)."""
    sums = {}
    for row, new, positive in zip(similarity, scores, is_positive, strict=True):
        before = sorted(range(len(row)), key=lambda candidate: -row[candidate])
        after = sorted(before[:k], key=lambda candidate: -new[candidate]) + before[k:]
        for side, order in enumerate((before, after)):
            hits = [bool(positive[candidate]) for candidate in order]
            values = {f"R@{cutoff}": float(any(hits[:cutoff])) for cutoff in (1, 5, 10, k)}
            values["MRR"] = 1 / (1 + hits.index(True))
            gain = sum(1 / math.log2(place + 2) for place, hit in enumerate(hits[:10]) if hit)
            values["nDCG@10"] = gain / sum(1 / math.log2(place + 2) for place in range(min(sum(hits), 10)))
            for name, value in values.items():
                sums.setdefault(name, [0.0, 0.0])[side] += value / len(similarity)
    return sums


@settings(deadline=None, max_examples=60)
@given(retrievals(), st.booleans())
def test_every_metric_equals_that_of_the_plain_implementation(retrieval, is_image_query):
    similarity, scores, image_of_caption, k = retrieval
    is_own = image_of_caption[:, None] == np.arange(similarity.shape[1])
    make, turn = (image_to_text, np.transpose) if is_image_query else (text_to_image, np.asarray)

    scorer = swapped(table_scorer(scores)) if is_image_query else table_scorer(scores)
    comparison = evaluate(make(similarity, image_of_caption), scorer, k, num_resamples=3)

    expected = plain_metrics(turn(similarity), turn(scores), turn(is_own), k)
    assert {row.metric for row in comparison.rows} == expected.keys()
    for row in comparison.rows:
        before, after = expected[row.metric]
        assert row.first_stage.value == pytest.approx(before)
        assert row.reranked.value == pytest.approx(after)
        assert row.difference.value == pytest.approx(after - before)


@settings(deadline=None, max_examples=25)
@given(retrievals())
def test_recall_at_the_depth_of_reranking_does_not_change(retrieval):
    similarity, scores, image_of_caption, k = retrieval

    row = evaluate(text_to_image(similarity, image_of_caption), table_scorer(scores), k, num_resamples=20).row(f"R@{k}")

    assert row.first_stage == row.reranked
    assert (row.difference.low, row.difference.value, row.difference.high) == (0, 0, 0)


@settings(deadline=None, max_examples=25)
@given(retrievals())
def test_several_depths_at_once_give_the_results_of_each_alone(retrieval):
    similarity, scores, image_of_caption, k = retrieval
    task, scorer = text_to_image(similarity, image_of_caption), table_scorer(scores)

    together = evaluate_depths(task, scorer, [1, k], num_resamples=3)

    assert together == [evaluate(task, scorer, depth, num_resamples=3) for depth in (1, k)]


@settings(deadline=None, max_examples=25)
@given(retrievals())
def test_equal_scores_keep_the_first_stages_order(retrieval):
    similarity, scores, image_of_caption, k = retrieval

    comparison = evaluate(text_to_image(similarity, image_of_caption), table_scorer(0 * scores), k, num_resamples=3)

    assert all(row.first_stage == row.reranked for row in comparison.rows)


def test_ties_of_the_first_stage_keep_the_candidates_order():
    task = text_to_image(np.array([[0.5, 0.9, 0.5, 0.9]] * 4, np.float32), np.arange(4))

    assert first_stage(task, 4).top.tolist() == [[1, 3, 0, 2]] * 4


def test_an_image_counts_as_found_if_any_of_its_captions_is_first():
    similarity = np.array([[0.9, 0.0], [0.0, 0.0], [0.5, 0.8], [0.5, 0.9]], np.float32)

    comparison = evaluate(image_to_text(similarity, np.array([0, 0, 1, 1])), table_scorer(similarity.T), 2)

    assert comparison.row("R@1").reranked.value == 1.0
    first_and_last = (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert comparison.row("nDCG@10").reranked.value == pytest.approx((first_and_last + 1) / 2)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_the_error_for_a_score_that_is_not_finite_names_the_pair(bad):
    scores = np.zeros((3, 3), np.float32)
    scores[1, 2] = float(bad)

    with pytest.raises(ScoresUnusable, match=f"query 1 with candidate 2 is {bad}"):
        evaluate(text_to_image(np.eye(3, dtype=np.float32), np.arange(3)), table_scorer(scores), 3)


@pytest.mark.parametrize(
    "answer",
    [
        lambda q: np.zeros(len(q) + 1, np.float32),
        lambda q: np.zeros((len(q), 1), np.float32),
        lambda q: q,
        lambda q: None,
    ],
    ids=["too many", "a column", "integers", "nothing"],
)
def test_a_scorer_must_return_one_number_per_pair(answer):
    with pytest.raises(ScoresUnusable, match="expected one float32 per pair"):
        evaluate(text_to_image(np.eye(3, dtype=np.float32), np.arange(3)), lambda q, c: answer(q), 2)


def test_the_error_for_a_similarity_that_is_not_finite_names_the_pair():
    similarity = np.eye(3, dtype=np.float32)
    similarity[2, 1] = np.nan

    with pytest.raises(TaskInvalid, match="query 2 and candidate 1 is nan"):
        text_to_image(similarity, np.arange(3))


@pytest.mark.parametrize("k", [0, 4])
def test_a_depth_beyond_the_candidates_is_refused(k):
    with pytest.raises(TaskInvalid, match=f"k = {k} with 3 candidates: choose k from 1 to 3"):
        first_stage(text_to_image(np.eye(3, dtype=np.float32), np.arange(3)), k)


def test_images_of_one_group_are_resampled_together():
    image_of_caption, groups = np.array([0, 0, 1, 2]), np.array([7, 7, 8])
    similarity = np.zeros((4, 3), np.float32)

    assert text_to_image(similarity, image_of_caption, groups).cluster.tolist() == [7, 7, 7, 8]
    assert image_to_text(similarity, image_of_caption, groups).cluster.tolist() == [7, 7, 8]
    assert text_to_image(similarity, image_of_caption).cluster.tolist() == [0, 0, 1, 2]


def test_a_query_without_a_positive_is_refused():
    with pytest.raises(TaskInvalid, match="query 2 has no positive"):
        image_to_text(np.zeros((2, 3), np.float32), np.array([0, 1]))


@pytest.mark.parametrize(
    ("queries", "candidates", "words"),
    [([0, 1, 5], [0, 0, 0], "query outside"), ([0, 1], [0, 9], "candidate outside"), ([0, 1, 1], [0, 1, 1], "twice")],
)
def test_impossible_positives_are_refused(queries, candidates, words):
    with pytest.raises(TaskInvalid, match=words):
        RetrievalTask(
            "text-to-image", np.zeros((2, 2), np.float32), np.array(queries), np.array(candidates), np.arange(2)
        )


def test_similarities_of_a_shape_that_does_not_fit_the_captions_are_refused():
    with pytest.raises(TaskInvalid, match="one row per caption"):
        text_to_image(np.zeros((2, 3), np.float32), np.array([0, 1, 2]))


def test_a_ranking_that_changes_recall_at_its_depth_is_refused():
    task = text_to_image(np.eye(4, dtype=np.float32)[[0, 1, 2, 2]], np.arange(4))
    before = first_stage(task, 2)
    refuse_changed_recall(before.ranks, ranks_after(before, before.top[:, ::-1]), 2)

    smuggled = before.top.copy()
    smuggled[3] = [3, 2]  # the right image, which was not among the best two

    with pytest.raises(RecallChanged, match=r"R@2 is 0.7500 before .* and 1.0000 after .* first is query 3"):
        refuse_changed_recall(before.ranks, ranks_after(before, smuggled), 2)
    with pytest.raises(RecallChanged, match="R@2"):
        refuse_changed_recall(before.ranks, ranks_after(before, before.top * 0 + 3), 2)


def test_a_call_holds_all_candidates_of_its_queries_in_the_order_of_the_first_stage():
    task = text_to_image(np.random.default_rng(0).random((700, 30), np.float32), np.arange(700) % 30)
    calls, finished = [], []

    def scorer(query_index, candidate_index):
        calls.append((query_index, candidate_index))
        return np.zeros(len(query_index), np.float32)

    top = first_stage(task, 7).top
    score_top(scorer, top, on_progress=finished.append)

    assert len(calls) > 1
    assert max(len(queries) for queries, _ in calls) <= PAIRS_PER_CALL
    assert all(len(queries) % 7 == 0 for queries, _ in calls)
    assert np.concatenate([queries for queries, _ in calls]).tolist() == np.repeat(np.arange(700), 7).tolist()
    assert np.concatenate([candidates for _, candidates in calls]).tolist() == top.ravel().tolist()
    assert sum(finished) == 700


def test_large_tables_are_sorted_in_pieces_with_the_same_result(monkeypatch):
    task = text_to_image(np.random.default_rng(1).random((50, 20), np.float32), np.arange(50) % 20)
    whole = first_stage(task, 5)

    monkeypatch.setattr("edje.evaluation.protocol._CHUNK_VALUES", 70)
    pieces = first_stage(task, 5)

    assert (whole.top == pieces.top).all()
    assert (whole.ranks.rank == pieces.ranks.rank).all()


def test_reordering_keeps_the_order_of_ties():
    assert reorder(np.array([[7, 8, 9]]), np.array([[1, 2, 1]], np.float32)).tolist() == [[8, 7, 9]]


def test_recall_at_an_unusual_depth_is_reported_with_the_usual_ones():
    ranks = PositiveRanks(1, np.array([0]), np.array([12]))

    assert metric_names(20) == ["R@1", "R@5", "R@10", "R@20", "MRR", "nDCG@10"]
    assert metric_names(10) == ["R@1", "R@5", "R@10", "MRR", "nDCG@10"]
    assert metric_columns(ranks, 20).tolist() == [[0, 0, 0, 1, 1 / 13, 0]]


def test_the_error_for_an_unknown_metric_lists_the_measured_ones():
    comparison = evaluate(text_to_image(np.eye(2, dtype=np.float32), np.arange(2)), table_scorer(np.eye(2)), 1)

    with pytest.raises(KeyError, match=r"no R@3 among R@1, R@5"):
        comparison.row("R@3")


def test_the_numpy_modules_do_not_import_torch():
    modules = ", ".join(f"edje.evaluation.{name}" for name in ("comparison", "cascade", "storage", "report", "plots"))
    script = f"import sys, {modules}; print([name for name in ('torch', 'matplotlib') if name in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"

"""What a request must keep to, and how its pairs are laid out."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocols.events import Query, RerankRequest
from workers.errors import Poison
from workers.rerank.admission import AdmissionLimits, admit, reply_topic_of
from workers.rerank.batching import bucket_of

LIMITS = AdmissionLimits(
    model_digest="ab" * 32,
    max_candidates=100,
    max_text_chars=200,
    piece_pairs=4,
    deadline_tolerance_s=0.5,
    reply_topic="rerank.responses",
    allowed_reply_topics=("replies.*",),
    reads_first_stage=False,
)
READS_SCORES = replace(LIMITS, reads_first_stage=True)
WALL = datetime(2026, 1, 1, tzinfo=UTC)


def encode(text: str) -> list[int]:
    return [101, *map(len, text.split()), 102]


def for_images(*images: str, **fields) -> RerankRequest:
    candidates = [{"image_id": image} for image in images]
    return RerankRequest(request_id="r", query=Query(text="a dog runs"), candidates=candidates, **fields)


def for_texts(*texts: str, **fields) -> RerankRequest:
    candidates = [{"text": text} for text in texts]
    return RerankRequest(request_id="r", query=Query(image_id="img"), candidates=candidates, **fields)


def admitted(request: RerankRequest, limits: AdmissionLimits = LIMITS):
    return admit(request, limits, encode, now=50.0, wall_now=WALL.timestamp())


def code_of(request: RerankRequest, limits: AdmissionLimits = LIMITS) -> str:
    with pytest.raises(Poison) as refused:
        admitted(request, limits)
    return refused.value.code


def test_a_text_query_is_encoded_once_and_paired_with_every_image():
    plan = admitted(for_images("a", "b", "c"))

    assert plan.texts == [encode("a dog runs")]
    assert plan.images == ["a", "b", "c"]
    assert plan.num_pairs == 3
    assert [(plan.pair_text(n), plan.pair_image(n)) for n in range(3)] == [(0, 0), (0, 1), (0, 2)]
    assert plan.candidate_ids == ["a", "b", "c"]
    assert plan.candidate_pairs is None


def test_an_image_query_is_paired_with_every_text():
    plan = admitted(for_texts("a dog", "a cat sits"))

    assert plan.texts == [encode("a dog"), encode("a cat sits")]
    assert plan.images == ["img"]
    assert [(plan.pair_text(n), plan.pair_image(n)) for n in range(2)] == [(0, 0), (1, 0)]


def test_a_candidate_that_comes_twice_is_scored_once():
    plan = admitted(for_images("a", "b", "a"))

    assert plan.images == ["a", "b"]
    assert plan.candidate_pairs == [0, 1, 0]
    assert plan.candidate_ids == ["a", "b", "a"]
    assert admitted(for_texts("x", "x")).candidate_pairs == [0, 0]


def scored(query: Query, *candidates: dict) -> RerankRequest:
    return RerankRequest(request_id="r", query=query, candidates=list(candidates))


FOUR_IMAGES = [
    {"image_id": "a", "score": 0.5},
    {"image_id": "b"},
    {"image_id": "c", "score": -2},
    {"image_id": "d", "score": None},
]


def test_the_first_stage_scores_are_laid_out_by_pair_for_an_engine_that_reads_them():
    plan = admitted(scored(Query(text="a dog"), *FOUR_IMAGES), READS_SCORES)

    assert plan.first_stage.dtype == np.float32
    np.testing.assert_array_equal(plan.first_stage, [0.5, np.nan, -2, np.nan])


def test_the_first_stage_scores_are_left_where_they_are_for_an_engine_that_does_not_read_them():
    assert admitted(scored(Query(text="a dog"), *FOUR_IMAGES)).first_stage is None


def test_of_equal_candidates_the_first_that_has_a_score_speaks_for_all():
    texts = [("x", None), ("y", 0.1), ("x", 0.7), ("y", 0.2), ("z", None), ("x", 0.9)]

    plan = admitted(scored(Query(image_id="i"), *({"text": t, "score": s} for t, s in texts)), READS_SCORES)

    assert plan.candidate_pairs == [0, 1, 0, 1, 2, 0]
    np.testing.assert_array_equal(plan.first_stage, np.float32([0.7, 0.1, np.nan]))


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False)),
        max_size=20,
    )
)
def test_every_pair_has_the_first_score_of_its_image(candidates):
    request = scored(Query(text="x"), *({"image_id": str(image), "score": score} for image, score in candidates))

    plan = admitted(request, READS_SCORES)

    first: dict[str, float] = {}
    for image, score in candidates:
        if score is not None:
            first.setdefault(str(image), score)
    expected = [first.get(image, np.nan) for image in plan.images]
    np.testing.assert_array_equal(plan.first_stage, np.float32(expected))


@pytest.mark.parametrize("score", [3.5e38, -1e300])
def test_a_score_that_the_engine_cannot_hold_is_refused_by_an_engine_that_reads_it(score):
    request = scored(Query(text="x"), {"image_id": "a"}, {"image_id": "b", "score": score})

    assert code_of(request, READS_SCORES) == "score_too_large"
    assert admitted(request).num_pairs == 2


@pytest.mark.parametrize("score", [float("inf"), float("nan")])
def test_a_score_that_is_not_finite_is_no_request(score):
    with pytest.raises(ValidationError, match="finite"):
        scored(Query(text="x"), {"image_id": "a", "score": score})


@pytest.mark.parametrize("request_of", [for_images, for_texts])
def test_a_request_without_candidates_has_nothing_to_score(request_of):
    plan = admitted(request_of())

    assert (plan.num_pairs, plan.pieces, plan.candidate_ids) == (0, [], [])
    assert plan.images == []
    assert admitted(request_of(), READS_SCORES).first_stage.shape == (0,)


def test_a_deadline_is_moved_to_the_loops_clock_with_the_tolerance():
    deadline = datetime.fromtimestamp(WALL.timestamp() + 2, UTC)

    assert admitted(for_images("a", deadline=deadline)).deadline == pytest.approx(52.5)
    assert admitted(for_images("a")).deadline is None


@pytest.mark.parametrize(
    ("request_", "limits", "code"),
    [
        (for_images("a", model="cd" * 32), LIMITS, "model_not_served"),
        (for_images(*"abc"), replace(LIMITS, max_candidates=2), "too_many_candidates"),
        (for_images("a"), replace(LIMITS, max_text_chars=5), "text_too_long"),
        (for_texts("short", "far too long"), replace(LIMITS, max_text_chars=5), "text_too_long"),
        (for_images("a", reply_topic="images.new"), LIMITS, "reply_topic_not_allowed"),
    ],
)
def test_what_is_refused_has_a_code(request_, limits, code):
    assert code_of(request_, limits) == code


def test_replies_go_where_the_request_says_if_it_may():
    assert reply_topic_of(for_images("a"), LIMITS) == "rerank.responses"
    assert reply_topic_of(for_images("a", reply_topic="rerank.responses"), LIMITS) == "rerank.responses"
    assert reply_topic_of(for_images("a", reply_topic="replies.team"), LIMITS) == "replies.team"


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 7), st.booleans())
def test_every_pair_is_in_exactly_one_piece_of_its_own_bucket(lengths, piece_pairs, is_text_query):
    words = [" ".join(["w" * (number + 1)] * length)[:200] for number, length in enumerate(lengths)]
    request = for_images(*map(str, range(len(lengths)))) if is_text_query else for_texts(*words)

    plan = admitted(request, replace(LIMITS, piece_pairs=piece_pairs))

    assert sorted(pair for piece in plan.pieces for pair in piece.pairs) == list(range(plan.num_pairs))
    assert all(0 < len(piece.pairs) <= piece_pairs for piece in plan.pieces)
    for piece in plan.pieces:
        assert {bucket_of(len(plan.texts[plan.pair_text(pair)])) for pair in piece.pairs} == {piece.bucket}

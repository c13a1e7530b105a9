"""Events: what is accepted, what is refused."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from protocols.events import Candidate, ErrorInfo, ImageIndexed, ImageNew, Query, RerankRequest, RerankResponse, Result
from protocols.fields import MAX_CANDIDATES


def request(**changes):
    fields = {"request_id": "r-1", "query": Query(text="a dog"), "candidates": [Candidate(image_id="img-7")]}
    return RerankRequest(**fields | changes)


def response(**changes):
    return RerankResponse(**{"request_id": "r-1", "status": "ok", "model": "m", "engine": "e"} | changes)


@pytest.mark.parametrize("source", [{}, {"uri": "https://a/b.jpg", "data": b"x"}])
def test_an_image_has_exactly_one_source(source):
    with pytest.raises(ValidationError, match="exactly one of uri and data"):
        ImageNew(image_id="img-7", **source)


@pytest.mark.parametrize("kind", [{}, {"text": "a dog", "image_id": "img-7"}])
def test_a_query_is_a_text_or_an_image(kind):
    with pytest.raises(ValidationError, match="exactly one of text and image_id"):
        Query(**kind)


@pytest.mark.parametrize("bad_id", ["", "a" * 257, "a\nb", "a\x00", "a\x7f", "a\x85b"])
def test_an_id_is_short_and_printable(bad_id):
    with pytest.raises(ValidationError):
        request(request_id=bad_id)
    with pytest.raises(ValidationError):
        request(candidates=[Candidate(image_id=bad_id)])


def test_an_id_may_be_of_any_script():
    assert request(request_id="собака-犬").request_id == "собака-犬"


@pytest.mark.parametrize(
    "candidates",
    [
        [Candidate(image_id="img-7"), Candidate(text="a dog")],
        [Candidate(image_id="img-7"), Candidate(image_id="img-2", text="a dog")],
        [Candidate(image_id="img-7"), Candidate(score=0.5)],
    ],
)
def test_a_text_query_ranks_images_and_nothing_else(candidates):
    with pytest.raises(ValidationError, match="candidate 1 must be an image"):
        request(candidates=candidates)


def test_an_image_query_ranks_texts_and_nothing_else():
    with pytest.raises(ValidationError, match="candidate 0 must be a text"):
        request(query=Query(image_id="img-7"))


def test_a_request_without_candidates_is_a_request():
    assert request(candidates=[]).names() == []


def test_names_are_image_ids_or_the_names_given_to_texts():
    to_texts = request(query=Query(image_id="img-7"), candidates=[Candidate(text="a", id="t-1"), Candidate(text="b")])

    assert request().names() == ["img-7"]
    assert (to_texts.names(), to_texts.texts(), to_texts.image_ids()) == (["t-1", None], ["a", "b"], ["img-7"])


def test_more_candidates_than_the_wire_allows_are_refused():
    with pytest.raises(ValidationError, match="at most 100000"):
        request(candidates=[Candidate(image_id="a")] * (MAX_CANDIDATES + 1))


@pytest.mark.parametrize(
    "change",
    [
        {"top_n": 0},
        {"top_n": "3"},
        {"priority": 10},
        {"priority": -1},
        {"priority": True},
        {"reply_topic": "no spaces"},
        {"reply_topic": "a" * 250},
        {"candidates": [Candidate(image_id="a", score=float("nan"))]},
        {"candidates": [Candidate(image_id="a", score=float("inf"))]},
        {"query": Query.model_construct(text="a" * 10_001, image_id=None).model_dump()},
        {"schema_version": 2},
        {"deadline": datetime(2026, 11, 23)},
        {"deadline": 1_795_435_200},
        {"deadline": "1795435200"},
        {"deadline": "tomorrow"},
    ],
)
def test_a_field_out_of_bounds_is_refused(change):
    with pytest.raises(ValidationError):
        request(**change)


def test_a_deadline_keeps_its_instant():
    assert request(deadline="2026-11-23T14:00:00.25+02:00").deadline == datetime(2026, 11, 23, 12, 0, 0, 250_000, UTC)


def test_metadata_is_bounded():
    with pytest.raises(ValidationError):
        ImageNew(image_id="a", uri="https://a", metadata={str(n): "" for n in range(65)})
    with pytest.raises(ValidationError):
        ImageNew(image_id="a", uri="https://a", metadata={"note": "x" * 2_049})


def test_an_error_is_explained_and_a_ranking_is_not():
    with pytest.raises(ValidationError, match="needs an error"):
        response(status="error")
    with pytest.raises(ValidationError, match="cannot have an error"):
        response(error=ErrorInfo(code="a", message="b"))


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_a_relevance_score_is_a_probability(score):
    with pytest.raises(ValidationError):
        Result(index=0, relevance_score=score, logit=0.0)


def test_a_content_digest_is_lower_case_hex():
    with pytest.raises(ValidationError):
        ImageIndexed(image_id="a", model="m", num_tokens=64, dtype="int8", num_bytes=1, content_sha256="A" * 64)


def test_an_event_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        request().priority = 3

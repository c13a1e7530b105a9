"""What a request must keep to, how its pairs are laid out, and where an error about it is sent."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.calibration import Direction
from edje.first_stage_scores import standardise
from protocols.encoding import CONTENT_TYPE_HEADER, JSON, MSGPACK
from workers.errors import Poison
from workers.ports import Headers, Partition, Record
from workers.rerank.admission import AdmissionLimits, open_request, read_request, salvage_address
from workers.rerank.request import Request
from workers.telemetry.tracer import Tracer

LIMITS = AdmissionLimits(
    model_digest="ab" * 32,
    max_request_bytes=1 << 20,
    max_candidates=100,
    max_text_chars=200,
    deadline_tolerance_s=0.5,
    reply_topic="rerank.responses",
    allowed_reply_topics=("replies.*",),
    reads_first_stage=(),
)
READS_SCORES = replace(LIMITS, reads_first_stage=get_args(Direction))
WALL = datetime(2026, 1, 1, tzinfo=UTC)


def for_images(*images: str, **fields: Any) -> dict[str, Any]:
    candidates = [{"image_id": image} for image in images]
    return {"request_id": "r", "query": {"text": "a dog runs"}, "candidates": candidates, **fields}


def for_texts(*texts: str, **fields: Any) -> dict[str, Any]:
    candidates = [{"text": text} for text in texts]
    return {"request_id": "r", "query": {"image_id": "img"}, "candidates": candidates, **fields}


def opened(sent: dict[str, Any] | bytes, headers: Headers = (), limits: AdmissionLimits = LIMITS) -> Request:
    value = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    record = Record(Partition("rerank.requests", 0), 0, b"key", value, headers, 0)
    return open_request(record, Tracer.off().begin(headers), limits, 50.0)


def admitted(sent: dict[str, Any], limits: AdmissionLimits = LIMITS) -> Request:
    request = opened(sent, limits=limits)
    read_request(request, limits, now=50.0, wall_now=WALL.timestamp())
    return request


def refused(sent: dict[str, Any] | bytes, limits: AdmissionLimits = LIMITS) -> tuple[str, Request]:
    request = opened(sent, limits=limits)
    with pytest.raises(Poison) as caught:
        read_request(request, limits, now=50.0, wall_now=WALL.timestamp())
    if request.request_id is None:
        salvage_address(request, limits)
    return caught.value.code, request


def test_a_text_query_is_paired_with_every_image():
    request = admitted(for_images("a", "b", "c"))

    assert (request.direction, request.texts, request.images) == ("text-to-image", ["a dog runs"], ["a", "b", "c"])
    assert request.num_pairs == 3
    assert [(request.text_of_pair(n), request.image_of_pair(n)) for n in range(3)] == [(0, "a"), (0, "b"), (0, "c")]
    assert request.candidate_ids == ["a", "b", "c"]
    assert request.pair_of_candidate is None


def test_an_image_query_is_paired_with_every_text():
    request = admitted(for_texts("a dog", "a cat sits"))

    assert (request.direction, request.texts, request.images) == ("image-to-text", ["a dog", "a cat sits"], ["img"])
    assert [(request.text_of_pair(n), request.image_of_pair(n)) for n in range(2)] == [(0, "img"), (1, "img")]


def test_a_candidate_that_comes_twice_is_one_pair():
    request = admitted(for_images("a", "b", "a"))

    assert request.images == ["a", "b"]
    assert request.pair_of_candidate.tolist() == [0, 1, 0]
    assert request.candidate_ids == ["a", "b", "a"]
    assert admitted(for_texts("x", "x")).pair_of_candidate.tolist() == [0, 0]


SCORES = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(st.integers(0, 5), SCORES), min_size=1, max_size=20))
def test_every_pair_has_the_standardised_score_of_its_first_candidate(candidates):
    sent = for_images() | {"candidates": [{"image_id": str(image), "score": score} for image, score in candidates]}

    request = admitted(sent, READS_SCORES)

    standard = standardise([score for _, score in candidates])
    images = [str(image) for image, _ in candidates]
    expected = [standard.values[images.index(image)] for image in request.images]
    np.testing.assert_array_equal(request.first_stage, np.float32(expected))
    codes = [] if standard.fault is None else [f"first_stage_scores_{standard.fault}"]
    assert [warning.code for warning in request.warnings] == codes


def test_scores_are_not_read_for_a_direction_whose_ranking_does_not_use_them():
    only_images = replace(LIMITS, reads_first_stage=("text-to-image",))

    assert admitted(for_images("a", "b")).first_stage is None
    assert admitted(for_texts("a", "b"), only_images).first_stage is None
    assert admitted(for_texts("a", "b"), only_images).warnings == []
    assert admitted(for_images("a", "b"), only_images).first_stage is not None


@pytest.mark.parametrize("sent", [for_images(), for_texts()])
def test_a_request_without_candidates_has_no_pairs(sent):
    request = admitted(sent, READS_SCORES)

    assert (request.num_pairs, request.candidate_ids, request.texts, request.images) == (0, [], (), ())


def test_a_deadline_is_moved_to_the_loops_clock_with_the_tolerance():
    deadline = datetime.fromtimestamp(WALL.timestamp() + 2, UTC).isoformat()

    assert admitted(for_images("a", deadline=deadline)).deadline == pytest.approx(52.5)
    assert admitted(for_images("a")).deadline is None


@pytest.mark.parametrize(
    ("sent", "limits", "code"),
    [
        (for_images("a", model="cd" * 32), LIMITS, "model_not_served"),
        (for_images(*"abc"), replace(LIMITS, max_candidates=2), "too_many_candidates"),
        (for_images("a"), replace(LIMITS, max_text_chars=5), "text_too_long"),
        (for_texts("short", "far too long"), replace(LIMITS, max_text_chars=5), "text_too_long"),
        (for_images("a", reply_topic="images.new"), LIMITS, "reply_topic_not_allowed"),
        (for_images("a", padding="x" * 1000), replace(LIMITS, max_request_bytes=1000), "event_too_large"),
        (for_images("a", unknown=[[]] * 20_000), LIMITS, "event_too_large"),
        (for_images("a", top_n=0), LIMITS, "invalid_event"),
    ],
)
def test_what_is_refused_has_a_code_and_its_id(sent, limits, code):
    found, request = refused(sent, limits)

    assert (found, request.request_id) == (code, "r")


def test_a_reply_goes_to_the_topic_and_partition_that_the_request_names_if_the_topic_is_allowed():
    named = admitted(for_images("a", reply_topic="replies.team", reply_partition=3))
    default = admitted(for_images("a", reply_topic="rerank.responses", reply_partition=1))

    assert (named.reply_topic, named.reply_partition) == ("replies.team", 3)
    assert (default.reply_topic, default.reply_partition) == ("rerank.responses", 1)
    assert admitted(for_images("a")).reply_topic == "rerank.responses"
    assert admitted(for_images("a")).reply_partition is None


@pytest.mark.parametrize(
    ("address", "topic", "partition"),
    [
        ({"reply_topic": "replies.team", "reply_partition": 3}, "replies.team", 3),
        ({"reply_topic": "payments", "reply_partition": 3}, "rerank.responses", 3),
        ({"reply_topic": "no spaces", "reply_partition": -1}, "rerank.responses", None),
        ({"reply_topic": 5, "reply_partition": "1"}, "rerank.responses", None),
        ({}, "rerank.responses", None),
    ],
)
@pytest.mark.parametrize("broken", [b'"top_n": 0', b'"text": "\\ud83d"'])
def test_the_address_of_a_broken_request_is_read_as_far_as_possible(address, topic, partition, broken):
    value = json.dumps({"request_id": "r-7", **address}).encode()[:-1] + b", " + broken + b"}"

    _, request = refused(value)

    assert (request.request_id, request.reply_topic, request.reply_partition) == ("r-7", topic, partition)


@pytest.mark.parametrize(
    ("content_types", "expected"),
    [
        ([], JSON),
        ([MSGPACK], MSGPACK),
        ([JSON, MSGPACK], MSGPACK),
        ([MSGPACK, JSON], JSON),
        (["text/xml"], JSON),
    ],
)
def test_a_reply_has_the_content_type_of_its_request_or_json(content_types, expected):
    headers = tuple((CONTENT_TYPE_HEADER, each.encode()) for each in content_types)

    assert opened(b"", headers).content_type == expected

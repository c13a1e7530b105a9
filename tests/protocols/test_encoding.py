"""Encodings: what goes in comes out, and nothing hostile does more than an EventError."""

import base64
import json

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.encoding import (
    JSON,
    MAX_ERROR_CHARS,
    MSGPACK,
    EventError,
    content_type_of,
    decode,
    encode,
    encode_response,
)
from protocols.events import ImageIndexed, ImageNew, RerankRequest, RerankResponse, Result
from strategies import digests, events, explanations, finite, ids, timings, warnings

MODELS = [ImageNew, ImageIndexed, RerankRequest, RerankResponse]
REQUEST = {"request_id": "r-1", "query": {"text": "a dog"}, "candidates": [{"image_id": "img-7", "score": 0.31}]}

both_encodings = pytest.mark.parametrize("content_type", [JSON, MSGPACK])


def written(fields, content_type):
    return json.dumps(fields).encode() if content_type == JSON else msgpack.packb(fields)


@both_encodings
@given(event=events)
def test_an_event_survives_both_encodings(content_type, event):
    assert decode(type(event), encode(event, content_type), content_type) == event


@both_encodings
@given(model=st.sampled_from(MODELS), value=st.binary(max_size=300))
def test_arbitrary_bytes_are_an_event_error(content_type, model, value):
    with pytest.raises(EventError):
        decode(model, value, content_type)


_trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@both_encodings
@given(model=st.sampled_from(MODELS), tree=_trees, field=st.sampled_from(sorted(RerankRequest.model_fields)))
def test_any_tree_in_any_field_is_an_event_error_or_an_event(content_type, model, tree, field):
    value = written({**REQUEST, "image_id": "img-7", field: tree}, content_type)

    try:
        event = decode(model, value, content_type)
    except EventError as caught:
        refusal = caught
    else:
        assert decode(model, encode(event, content_type), content_type) == event
        return

    assert refusal.code in {"unsupported_version", "invalid_event"}
    assert len(str(refusal)) <= MAX_ERROR_CHARS


@both_encodings
def test_unknown_fields_are_ignored_and_null_is_absent(content_type):
    fields = {**REQUEST, "top_n": None, "color": {"deep": [1]}, "candidates": [{"image_id": "a", "text": None, "x": 1}]}

    request = decode(RerankRequest, written(fields, content_type), content_type)

    assert request.top_n is None
    assert request.image_ids() == ["a"]


@both_encodings
def test_another_schema_version_is_named_whatever_else_is_wrong(content_type):
    with pytest.raises(EventError, match="only schema_version 1") as caught:
        decode(RerankRequest, written({"schema_version": 2, "query": 5}, content_type), content_type)

    assert caught.value.code == "unsupported_version"


@pytest.mark.parametrize(
    ("content_type", "value"),
    [
        (JSON, b""),
        (JSON, b"{"),
        (JSON, b"\xff\xfe"),
        (JSON, b"[" * 100_000),
        (JSON, b'{"request_id": "\\ud800"}'),
        (MSGPACK, b""),
        (MSGPACK, b"\x91" * 100_000),
        (MSGPACK, b"\xdd\xff\xff\xff\xff"),  # announces 4 billion elements
        (MSGPACK, b"\xdf\xff\xff\xff\xff"),
        (MSGPACK, msgpack.packb({1: 2})),
        (MSGPACK, msgpack.packb(msgpack.Timestamp(1))),
        (MSGPACK, msgpack.packb({"a": msgpack.ExtType(4, b"")})),
        (MSGPACK, msgpack.packb(REQUEST) + b"\x00"),
        (MSGPACK, b"\x81\xa1a\xa2\xff\xff"),
    ],
)
def test_bytes_that_are_no_such_encoding_are_undecodable(content_type, value):
    with pytest.raises(EventError) as caught:
        decode(RerankRequest, value, content_type)

    assert caught.value.code == "undecodable"


def test_an_unsupported_content_type_is_named():
    with pytest.raises(EventError, match="application/x-protobuf") as caught:
        decode(RerankRequest, b"", "application/x-protobuf")

    assert caught.value.code == "unsupported_content_type"


def test_an_error_does_not_repeat_the_image():
    secret = base64.b64encode(b"pixels of a picture").decode()

    with pytest.raises(EventError) as caught:
        decode(ImageNew, json.dumps({"image_id": 3, "data": secret, "uri": secret}).encode())

    assert secret not in str(caught.value)


@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
def test_both_base64_alphabets_are_read_and_the_standard_one_is_written(alphabet):
    data = bytes([251, 255, 190])

    event = decode(ImageNew, json.dumps({"image_id": "a", "data": alphabet(data).decode()}).encode())

    assert event.data == data
    assert json.loads(encode(event))["data"] == "+/++"
    assert msgpack.unpackb(encode(event, MSGPACK))["data"] == data


@pytest.mark.parametrize(
    "spelling",
    [
        "+/++YWI=",
        "+/++YWI",
        "-_--YWI=",
        "+/++\r\nYWI=\r\n",
        " +/++ YWI= ",
        "data:image/png;base64,+/++YWI=",
        "DATA:image/png;charset=x;BASE64,-_--YWI",
    ],
)
def test_base64_is_read_as_people_write_it(spelling):
    event = decode(ImageNew, json.dumps({"image_id": "a", "data": spelling}).encode())

    assert event.data == bytes([251, 255, 190]) + b"ab"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("***", "is not base64"),
        ("+/++Y", "is not base64"),
        ("+/==++", "is not base64"),
        ("data:image/png,abc", "must hold base64"),
        ("data:image/png;base64", "must hold base64"),
        ("data:image/png;base64,***", "is not base64"),
        ("\u00e4\u00f6", "is not base64"),
        (7, "must be base64 text"),
        ("", "at least 1 item"),
        ("\n", "at least 1 item"),
    ],
)
def test_data_that_is_no_base64_is_refused_with_a_sentence(data, sentence):
    with pytest.raises(EventError, match=sentence) as caught:
        decode(ImageNew, json.dumps({"image_id": "a", "data": data}).encode())

    assert caught.value.code == "invalid_event"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((), JSON),
        ((("traceparent", b"00"),), JSON),
        ((("Content-Type", b"application/json; charset=utf-8"),), JSON),
        ((("content-type", b"APPLICATION/MSGPACK"),), MSGPACK),
        ((("content-type", b"application/x-msgpack"),), MSGPACK),
        ((("content-type", b""),), JSON),
        ((("content-type", b"\xff"),), "\ufffd"),
        ((("content-type", b"application/json"), ("Content-Type", b"application/msgpack")), MSGPACK),
        ((("content-type", b"application/msgpack"), ("content-type", b"")), JSON),
    ],
)
def test_the_content_type_is_what_the_header_means(headers, expected):
    assert content_type_of(headers) == expected


@both_encodings
@given(
    rows=st.lists(st.tuples(st.none() | ids, st.floats(0, 1), finite, st.none() | explanations), max_size=5),
    request_id=ids,
    digest=digests,
    missing=st.lists(ids, max_size=3),
    stages=timings,
    warnings=warnings,
)
def test_a_response_written_directly_is_the_response_of_the_model(
    content_type, rows, request_id, digest, missing, stages, warnings
):
    names = [name for name, *_ in rows]
    order = list(range(len(rows)))[::-1]
    results = [
        Result(index=i, id=rows[i][0], relevance_score=rows[i][1], logit=rows[i][2], explanation=rows[i][3])
        for i in order
    ]
    model = RerankResponse(
        request_id=request_id,
        status="partial",
        results=results,
        missing=missing,
        model=digest,
        engine=digest,
        timings_ms=stages,
        warnings=warnings,
    )

    value = encode_response(
        request_id,
        "partial",
        order,
        names,
        [result.relevance_score for result in results],
        [result.logit for result in results],
        missing=missing,
        model=digest,
        engine=digest,
        timings_ms=stages,
        warnings=warnings,
        explanations={index: row[3] for index, row in enumerate(rows) if row[3] is not None},
        content_type=content_type,
    )

    assert decode(RerankResponse, value, content_type) == model
    if content_type == JSON:
        assert json.loads(value) == json.loads(encode(model))


@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_not_written(logit):
    with pytest.raises(ValueError, match="not finite"):
        encode_response("r", "ok", [0], ["a"], [0.5], [logit], missing=[], model="m", engine="e", timings_ms={})


def decoding_error(value, content_type=JSON, **bounds):
    with pytest.raises(EventError) as caught:
        decode(RerankRequest, value, content_type, **bounds)
    return caught.value


@both_encodings
def test_an_event_over_the_bound_of_bytes_is_refused_before_it_is_parsed(content_type):
    value = written(REQUEST, content_type)

    assert decode(RerankRequest, value, content_type, max_bytes=len(value)).request_id == "r-1"
    assert decoding_error(value, content_type, max_bytes=len(value) - 1).code == "event_too_large"
    assert decoding_error(b"x" * 11, content_type, max_bytes=10).code == "event_too_large"


@both_encodings
def test_an_event_of_very_many_lists_is_refused_at_little_cost(content_type):
    many = {**REQUEST, "unknown": [[]] * 90_000}
    value = written(many, content_type)

    error = decoding_error(value, content_type, max_containers=1_000)

    assert (error.code, str(error)) == ("event_too_large", "the event has more than 1000 lists and objects")
    assert decode(RerankRequest, value, content_type).request_id == "r-1"


@both_encodings
def test_a_list_nested_in_lists_beyond_any_use_is_undecodable(content_type):
    deep = b"[" * 5_000 + b"]" * 5_000 if content_type == JSON else b"\x91" * 5_000 + b"\x90"

    assert decoding_error(deep, content_type).code == "undecodable"


@both_encodings
def test_a_null_value_is_undecodable(content_type):
    assert decoding_error(None, content_type).code == "undecodable"


def test_of_a_field_that_comes_twice_the_last_counts_in_both_encodings():
    pairs = [("request_id", "first"), *REQUEST.items()]
    json_value = b"{" + b",".join(json.dumps(k).encode() + b":" + json.dumps(v).encode() for k, v in pairs) + b"}"
    msgpack_value = bytes([0x80 + len(pairs)]) + b"".join(msgpack.packb(k) + msgpack.packb(v) for k, v in pairs)

    assert decode(RerankRequest, json_value).request_id == "r-1"
    assert decode(RerankRequest, msgpack_value, MSGPACK).request_id == "r-1"

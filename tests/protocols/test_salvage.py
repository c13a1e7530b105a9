"""Fields of broken messages: read where that is possible, never guessed, never an exception."""

import json
import time

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.encoding import JSON, MSGPACK
from protocols.salvage import salvage, salvage_id
from strategies import ids

REQUEST = {"request_id": "r-9", "query": {"text": "a dog"}, "candidates": [{"image_id": "img-7"}]}
both_encodings = pytest.mark.parametrize("content_type", [JSON, MSGPACK])


def written(fields, content_type=JSON):
    return json.dumps(fields).encode() if content_type == JSON else msgpack.packb(fields)


@both_encodings
@pytest.mark.parametrize("fields", [{"request_id": "r-9"}, {**REQUEST, "candidates": 3}, {"a": [1, {}], **REQUEST}])
def test_the_id_of_an_invalid_event_is_read(content_type, fields):
    assert salvage_id(written(fields, content_type), None, "request_id") == "r-9"


@both_encodings
@pytest.mark.parametrize("id_first", [True, False])
def test_the_id_of_a_huge_event_is_read_at_little_cost(content_type, id_first):
    fields = {"candidates": [{"image_id": "a"}] * 1_000_000, "request_id": "r-9"}
    value = written(dict(reversed(fields.items())) if id_first else fields, content_type)

    began_at = time.perf_counter()
    found = salvage_id(value, None, "request_id")

    assert found == "r-9"
    assert time.perf_counter() - began_at < 1.0


@both_encodings
def test_the_id_of_a_message_that_ends_too_early_is_read(content_type):
    assert salvage_id(written(REQUEST, content_type)[:-5], None, "request_id") == "r-9"


@pytest.mark.parametrize(
    "value",
    [
        b'{"request_id": "r-9", "query": {"text": "dog \\ud83d"}}',  # half an emoji
        b'\xef\xbb\xbf{"request_id": "r-9"}',
        b'{"query": {"text": "caf\xe9"}, "request_id": "r-9"}',
        b'{"request_id": "r-9", "score": NaN}',
        b'{"request_id": "r-9"} and more',
        b'{"request_id": "r-9",}',
        b'{\'query\': 1, "request_id" : "r-9"}',
        b'{"query": {"text": "line\nbreak"}, "request_id": "r-9"}',
        b'{"request_id": "first", "request_id": "r-9"}',
        b'{"nested": {"request_id": "inner"}, "request_id": "r-9", "other": [{"request_id": "inner"}]}',
        b'{"query": {"text": "\\"request_id\\": \\"quoted\\""}, "request_id": "r-9"}',
        b'{"body": {"request_id": "r-9"}}',
        b'[{"request_id": "r-9"}]',
        b'{"request_id": "r\\u002d9", ',
        b"\x82\xaarequest_id\xa3r-9",
        b"\x81\xaarequest_id\xc4\x03r-9",  # raw bytes
        b"\x81\xc4\x0arequest_id\xa3r-9",
        b"\x82\xaarequest_id\xa5first\xaarequest_id\xa3r-9",
    ],
)
def test_an_id_is_read_from_a_message_broken_in_many_ways(value):
    assert salvage_id(value, b"key", "request_id") == "r-9"


@both_encodings
def test_a_whole_number_is_an_id(content_type):
    assert salvage_id(written({"request_id": 7}, content_type), None, "request_id") == "7"
    assert salvage_id(b'{"request_id": 12', None, "request_id") is None  # more digits may be missing


@both_encodings
@pytest.mark.parametrize("bad_id", ["", "a\nb", "x" * 257, None, ["r"], {"a": "r"}, True, 1.5])
def test_what_is_no_id_is_not_read_and_the_key_counts(content_type, bad_id):
    value = written({"request_id": bad_id}, content_type)

    assert salvage_id(value, None, "request_id") is None
    assert salvage_id(value, b"r-key", "request_id") == "r-key"


@pytest.mark.parametrize("value", [None, b"", b"\xff\xfe", b"no json", b'{"request_id": "caf\xe9"}', b"\xc1"])
def test_the_key_is_the_id_where_the_value_has_none(value):
    assert salvage_id(value, b"r-9", "request_id") == "r-9"
    assert salvage_id(value, b"\xff", "request_id") is None
    assert salvage_id(value, None, "request_id") is None


def test_other_fields_are_read_with_their_type():
    value = b'{"reply_topic": "mine.a", "reply_partition": 3, "query": "\\ud83d"'

    assert (salvage(value, "reply_topic"), salvage(value, "reply_partition")) == ("mine.a", 3)
    assert salvage(value, "query") is None  # half an emoji is no text either
    assert salvage(value, "deadline") is None


@given(
    st.binary(max_size=300) | st.text('{}[]",:\\ request_id0', max_size=200).map(str.encode), st.none() | st.binary()
)
def test_no_bytes_raise(value, key):
    salvage_id(value, key, "request_id")


@pytest.mark.parametrize("value", [b"[" * 1_000_000, b'"' * 1_000_000, b'{"request_id":' * 70_000, b"\x80" * 1_000_000])
def test_hostile_bytes_cost_little(value):
    began_at = time.perf_counter()
    salvage_id(value, None, "request_id")

    assert time.perf_counter() - began_at < 0.5


@both_encodings
@given(request_id=ids, before=st.dictionaries(st.text(max_size=5), st.text() | st.lists(st.text(), max_size=2)))
def test_the_id_of_a_valid_message_is_the_one_that_was_written(content_type, request_id, before):
    assert salvage_id(written({**before, "request_id": request_id}, content_type), None, "request_id") == request_id

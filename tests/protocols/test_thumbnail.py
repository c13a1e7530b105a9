"""Thumbnails: what is stored comes back, and anything else is no thumbnail."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.source_position import SourcePosition, position_of, removal_marker
from protocols.thumbnail import MAX_THUMBNAIL_BYTES, encode_thumbnail, thumbnail_of


@given(st.binary(min_size=1, max_size=MAX_THUMBNAIL_BYTES))
def test_a_thumbnail_comes_back_with_its_position(file):
    value = encode_thumbnail(file, SourcePosition(7, 1_000))

    assert thumbnail_of(value) == file
    assert position_of(value) == (7, 1_000)
    assert msgpack.unpackb(value)["file"] == file


@given(st.binary(max_size=80) | st.none())
def test_other_values_are_no_thumbnail(value):
    assert thumbnail_of(value) is None


@pytest.mark.parametrize(
    "value",
    [
        removal_marker(SourcePosition(7, 1_000)),
        encode_thumbnail(b"file", SourcePosition())[:-1],
        encode_thumbnail(b"file", SourcePosition()) + b"x",
        encode_thumbnail(b"file", SourcePosition())[:-6] + msgpack.packb("text"),
    ],
)
def test_a_marker_or_a_damaged_value_is_no_thumbnail(value):
    assert thumbnail_of(value) is None


@pytest.mark.parametrize("file", [b"", bytes(MAX_THUMBNAIL_BYTES + 1)])
def test_a_thumbnail_of_another_size_is_refused(file):
    with pytest.raises(ValueError, match="bytes"):
        encode_thumbnail(file, SourcePosition())

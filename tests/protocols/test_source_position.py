"""Source positions: the later event of an image wins, and every stored value shows its position at fixed bytes."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.source_position import (
    HEAD_BYTES,
    SourcePosition,
    is_removal_marker,
    may_replace,
    position_of,
    removal_marker,
    value_head,
    with_position,
)

_numbers = st.integers(0, 2**53 - 1)
_positions = st.builds(SourcePosition, _numbers, _numbers)


@given(_positions)
def test_a_position_comes_back_from_the_head_of_a_value(position):
    value = value_head(3, position) + msgpack.packb("x") + msgpack.packb(b"anything")

    assert position_of(value) == position
    assert msgpack.unpackb(value)["x"] == b"anything"


@given(_positions, _positions)
def test_another_position_leaves_the_rest_of_a_value_as_it_is(before, after):
    value = value_head(2, before) + b"rest"

    changed = with_position(value, after)

    assert position_of(changed) == after
    assert (changed[0], changed[HEAD_BYTES:]) == (value[0], b"rest")


@given(st.binary(max_size=80))
def test_arbitrary_bytes_have_no_position(value):
    assert position_of(value) is None
    assert not is_removal_marker(value)
    with pytest.raises(ValueError, match="no source position"):
        with_position(value, SourcePosition())


@given(offset=_numbers, timestamp_ms=_numbers)
def test_the_same_event_may_be_written_again(offset, timestamp_ms):
    assert SourcePosition(offset, timestamp_ms).may_replace(SourcePosition(offset, timestamp_ms))


@pytest.mark.parametrize(
    ("stored", "new", "replaces"),
    [
        (SourcePosition(5, 500), SourcePosition(6, 600), True),
        (SourcePosition(6, 600), SourcePosition(5, 500), False),
        (SourcePosition(6, 900), SourcePosition(7, 500), True),  # a producer whose clock was ahead
        (SourcePosition(90, 500), SourcePosition(0, 600), True),  # a topic that was created again
        (SourcePosition(90, 500), SourcePosition(0, 500), False),
    ],
)
def test_the_later_event_wins(stored, new, replaces):
    assert new.may_replace(stored) is replaces
    assert may_replace(value_head(2, new) + b"new", value_head(2, stored) + b"stored") is replaces


@pytest.mark.parametrize("stored", [None, b"", b"rubbish"])
def test_a_value_without_a_position_is_replaced(stored):
    assert may_replace(removal_marker(SourcePosition()), stored)


def test_a_value_without_a_position_replaces():
    assert may_replace(b"rubbish", removal_marker(SourcePosition(5, 5)))


@pytest.mark.parametrize("position", [SourcePosition(-1, -1), SourcePosition(0, 2**63)])
def test_numbers_out_of_range_are_clipped(position):
    assert position_of(removal_marker(position)) == (0, 0 if position.timestamp_ms < 0 else 2**53 - 1)


def test_a_removal_marker_is_recognised_and_nothing_else_is():
    marker = removal_marker(SourcePosition(1, 2))

    assert is_removal_marker(marker)
    assert not is_removal_marker(marker + b"x")
    assert not is_removal_marker(value_head(3, SourcePosition(1, 2)))
    assert set(msgpack.unpackb(marker)) == {"version", "position"}

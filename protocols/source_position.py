"""The source position of a stored value: the position of the event of `images.new` from which it was made.

Every value the service writes to the store is a msgpack map that begins with the same two fields:

    version    an int below 128
    position   16 bytes: the event's offset and its timestamp in milliseconds, both unsigned, big endian

so the position is at a fixed offset of every value, and a store can compare two values without parsing them. A removed
image leaves a map of these two fields only, the removal marker. Knows nothing of the other fields of a value.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

#: Version of all values that start with these two fields. Version 1 had no position.
VALUE_VERSION = 2

_POSITION = struct.Struct(">QQ")
_LARGEST = 2**53 - 1  # the largest integer that a Lua number holds exactly
#: The bytes between the header of the map and the position.
BEFORE_POSITION = b"\xa7version" + bytes([VALUE_VERSION]) + b"\xa8position\xc4" + bytes([_POSITION.size])
POSITION_AT = 1 + len(BEFORE_POSITION)
#: The length of the fixed start of every value.
HEAD_BYTES = POSITION_AT + _POSITION.size
_LARGEST_FIXMAP = 15


class SourcePosition(NamedTuple):
    """The offset of an event in its partition, and its timestamp.

    The timestamp is needed if a topic is deleted and created again, because its offsets start from 0.
    """

    offset: int = 0
    timestamp_ms: int = 0

    def may_replace(self, stored: SourcePosition) -> bool:
        """Whether a value of this position may replace a stored one: the later event wins, a repeated event replaces.

        An event is later if its offset or its timestamp is later, because each alone can be wrong: the offset in a
        topic that was created again, and the timestamp if a producer's clock is ahead.
        """
        return self.offset >= stored.offset or self.timestamp_ms > stored.timestamp_ms


def value_head(num_fields: int, position: SourcePosition) -> bytes:
    """Return the first bytes of a value: a msgpack map of `num_fields` with version and position."""
    if not 2 <= num_fields <= _LARGEST_FIXMAP:
        raise ValueError(f"a value has 2 to {_LARGEST_FIXMAP} fields, not {num_fields}")
    # Kafka marks an unknown timestamp with -1.
    offset, timestamp_ms = (min(max(number, 0), _LARGEST) for number in position)
    return bytes([0x80 | num_fields]) + BEFORE_POSITION + _POSITION.pack(offset, timestamp_ms)


def position_of(value: bytes) -> SourcePosition | None:
    """Return the position of a stored value; None if the value does not start with one."""
    if len(value) < HEAD_BYTES or not value.startswith(BEFORE_POSITION, 1):
        return None
    return SourcePosition(*_POSITION.unpack_from(value, POSITION_AT))


def with_position(value: bytes, position: SourcePosition) -> bytes:
    """Return a copy of a stored value with another position. Raises `ValueError` if the value has none."""
    if position_of(value) is None:
        raise ValueError("the value has no source position")
    return value[:POSITION_AT] + value_head(2, position)[POSITION_AT:] + value[HEAD_BYTES:]


def may_replace(new: bytes, stored: bytes | None) -> bool:
    """Whether a value may replace the stored one. A value without a position always replaces and is always replaced."""
    before, after = position_of(stored or b""), position_of(new)
    return before is None or after is None or after.may_replace(before)


def removal_marker(position: SourcePosition) -> bytes:
    """Return the value that a removed image leaves, so that no earlier event stores the image again."""
    return value_head(2, position)


def is_removal_marker(value: bytes) -> bool:
    """Whether a stored value marks a removed image."""
    return len(value) == HEAD_BYTES and value[0] == 0x82 and position_of(value) is not None

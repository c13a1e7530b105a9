"""Reads single fields of messages that are not valid events, so that the sender of a broken message can be answered.

Never raises, and takes little time for any input. Knows nothing of events.
"""

from __future__ import annotations

import json
import re
from functools import cache

import msgpack
from pydantic import TypeAdapter, ValidationError

from protocols.fields import Id

#: Number of bytes of broken JSON searched at each end, because an id is among the first or the last fields.
_WINDOW_BYTES = 65_536
_MAX_MATCHES = 16
_MAX_MAP_ENTRIES = 1_024
_MAX_MSGPACK_BYTES = 2**31 - 1

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def salvage(value: bytes | None, field: str) -> str | int | None:
    """Return a top-level text or whole number of a broken JSON or msgpack message, or None.

    The encoding is recognised by the first byte, because the content type may be wrong. If a field occurs twice, the
    last one counts, as in a valid event.
    """
    if not value:
        return None
    if 0x80 <= value[0] <= 0x8F or value[0] in (0xDE, 0xDF):
        return _find_in_msgpack(value, field)
    return _find_in_json(value, field)


def salvage_id(value: bytes | None, key: bytes | None, field: str) -> str | None:
    """Return the id in this field of a broken message, or the message's key if the field holds no valid id.

    A whole number is converted to text.
    """
    found = salvage(value, field)
    for candidate in (found, key):
        try:
            text = candidate.decode("utf-8") if isinstance(candidate, bytes) else candidate
            return _id_adapter().validate_python(str(text) if isinstance(text, int) else text)
        except (ValidationError, UnicodeDecodeError):
            continue
    return None


def _find_in_json(value: bytes, field: str) -> str | int | None:
    start, end = value[:_WINDOW_BYTES], value[_WINDOW_BYTES:][-_WINDOW_BYTES:]
    pattern = _json_field(field)
    matches = [(start, match) for match in pattern.finditer(start)]
    tail = [(end, match) for match in pattern.finditer(end)]
    top_level = [match for window, match in tail[-_MAX_MATCHES:] if _depth(window[match.end() :]) == -1]
    top_level = [match for window, match in matches[:_MAX_MATCHES] if _depth(window[: match.start()]) == 1] + top_level
    chosen = top_level[-1:] or [match for _, match in (*matches, *tail)][:1]
    if not chosen:
        return None
    try:
        found = json.loads(chosen[0].group(1).decode("utf-8"), strict=False)
        str(found).encode()
    except ValueError:  # not UTF-8, or half of a surrogate pair
        return None
    return found if isinstance(found, str | int) else None


@cache
def _json_field(field: str) -> re.Pattern[bytes]:
    # A string, or a whole number followed by a delimiter, without which the number may be incomplete.
    name = re.escape(field.encode())
    return re.compile(rb'"%b"\s*:\s*("(?:[^"\\]|\\.){0,2048}"|-?\d{1,100}(?=\s*[,}\]]))' % name, re.DOTALL)


def _depth(text: bytes) -> int:
    """Return the number of opening brackets minus the number of closing brackets, outside strings."""
    bare = _STRING.sub(b"", text)
    return bare.count(b"{") + bare.count(b"[") - bare.count(b"}") - bare.count(b"]")


def _find_in_msgpack(value: bytes, field: str) -> str | int | None:
    unpacker = msgpack.Unpacker(
        raw=True,
        strict_map_key=False,
        max_buffer_size=_MAX_MSGPACK_BYTES,
        max_ext_len=0,
        object_hook=_refuse_container,
        list_hook=_refuse_container,
    )
    found: object = None
    try:
        unpacker.feed(value)
        for _ in range(min(unpacker.read_map_header(), _MAX_MAP_ENTRIES)):
            if unpacker.unpack() == field.encode():
                found = unpacker.unpack()
            else:
                unpacker.skip()
    except (ValueError, msgpack.UnpackException):
        pass  # cut off, or not msgpack: a value found earlier is still returned
    if isinstance(found, bytes):
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _refuse_container(container: object) -> object:
    raise ValueError("only names and scalars are read")


@cache
def _id_adapter() -> TypeAdapter[str]:
    return TypeAdapter(Id)

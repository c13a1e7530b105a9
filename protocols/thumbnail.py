"""The thumbnail: a small image file in one value of the store, for pages that show results.

A msgpack map of three fields: version and position as in every stored value (source_position.py), then `file`, a WebP
image.
"""

from __future__ import annotations

import msgpack

from protocols.source_position import HEAD_BYTES, SourcePosition, position_of, value_head

MAX_THUMBNAIL_BYTES = 12 * 1024
_NAME = msgpack.packb("file")


def thumbnail_key(image_id: str) -> str:
    """Return the store's key of one image's thumbnail, the same under every model."""
    return f"th:{image_id}"


def encode_thumbnail(file: bytes, position: SourcePosition) -> bytes:
    """Return the stored value of a thumbnail. Raises `ValueError` if it is empty or too large."""
    if not 0 < len(file) <= MAX_THUMBNAIL_BYTES:
        raise ValueError(f"a thumbnail has 1 to {MAX_THUMBNAIL_BYTES} bytes, not {len(file)}")
    packed: bytes = msgpack.packb(file)
    return value_head(3, position) + _NAME + packed


def thumbnail_of(value: bytes | None) -> bytes | None:
    """Return the image file of a stored value; None for no value, a removed image, or a value of another kind."""
    if value is None or position_of(value) is None or not value.startswith(_NAME, HEAD_BYTES):
        return None
    try:
        file = msgpack.unpackb(value[HEAD_BYTES + len(_NAME) :], max_bin_len=MAX_THUMBNAIL_BYTES)
    except (ValueError, msgpack.UnpackException):
        return None
    return file if isinstance(file, bytes) else None

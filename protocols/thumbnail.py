"""The thumbnail: a small JPEG of an image in one value of the store, for pages that show results.

A msgpack map of three fields: version and position as in every stored value (source_position.py), then `jpeg`.
"""

from __future__ import annotations

import msgpack

from protocols.source_position import HEAD_BYTES, SourcePosition, position_of, value_head

MAX_THUMBNAIL_BYTES = 12 * 1024
_NAME = msgpack.packb("jpeg")


def thumbnail_key(image_id: str) -> str:
    """Return the store's key of one image's thumbnail, the same under every model."""
    return f"th:{image_id}"


def encode_thumbnail(jpeg: bytes, position: SourcePosition) -> bytes:
    """Return the stored value of a thumbnail. Raises `ValueError` if it is empty or too large."""
    if not 0 < len(jpeg) <= MAX_THUMBNAIL_BYTES:
        raise ValueError(f"a thumbnail has 1 to {MAX_THUMBNAIL_BYTES} bytes, not {len(jpeg)}")
    packed: bytes = msgpack.packb(jpeg)
    return value_head(3, position) + _NAME + packed


def thumbnail_of(value: bytes | None) -> bytes | None:
    """Return the JPEG of a stored value; None if there is no value, the image was removed, or it is no thumbnail."""
    if value is None or position_of(value) is None or not value.startswith(_NAME, HEAD_BYTES):
        return None
    try:
        jpeg = msgpack.unpackb(value[HEAD_BYTES + len(_NAME) :], max_bin_len=MAX_THUMBNAIL_BYTES)
    except (ValueError, msgpack.UnpackException):
        return None
    return jpeg if isinstance(jpeg, bytes) else None

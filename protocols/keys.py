"""The keys of token blobs and thumbnails in the store.

The key of a blob holds the model digest, so that the tokens of two models lie beside each other.
"""

from __future__ import annotations

from collections.abc import Iterable


def blob_key(model_digest: str, image_id: str) -> str:
    """Return the key of one image's tokens under one model."""
    return f"vt:{model_digest}:{image_id}"


def blob_keys(model_digest: str, image_ids: Iterable[str]) -> list[str]:
    """Return the keys of many images, in order."""
    prefix = blob_key(model_digest, "")
    return [prefix + image_id for image_id in image_ids]


def thumbnail_key(image_id: str) -> str:
    """Return the key of one image's thumbnail, the same under every model."""
    return f"th:{image_id}"

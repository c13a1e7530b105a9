"""Visual tokens as the service stores them and its engine reads them: encoded, decoded, dequantised.

Uses the code that writes and reads the store's blobs, so that an evaluation uses the same tokens as the service.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edje.evaluation.errors import StorageImpossible
from protocols.blob import BlobLayout, decode_blobs, dequantize, encode_blob
from protocols.quantize import StorageType

#: `none` is the model's float32, which the service cannot store; it shows the cost of rounding.
Storage = Literal["none", "fp16", "bf16", "int8", "int4"]

#: The blob's field for the image file's hash; an evaluation names images by number.
_NO_SHA256 = bytes(32)


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """The tokens of all images, rounded as their storage type rounds, and the size of one image."""

    storage: Storage
    tokens: NDArray[np.float32]  # (images, m, d), dequantised
    blobs: tuple[bytes, ...]  # of the same images, for an engine that reads blobs; empty for `none`
    payload_bytes_per_image: int  # values and scales
    blob_bytes_per_image: int | None  # of the value in the store; None for `none`


def store_tokens(tokens: NDArray[np.float32], storage: Storage, model_digest: str) -> StoredTokens:
    """Round `(images, m, d)` tokens as a storage type does. Raises `StorageImpossible`, which names the image."""
    num_images, num_tokens, token_dim = tokens.shape
    if storage == "none":
        _refuse_not_finite(tokens)
        return StoredTokens(storage, tokens, (), 4 * num_tokens * token_dim, None)
    layout = _layout(model_digest, num_tokens, token_dim, storage)
    blobs = tuple(_encoded(layout, number, image) for number, image in enumerate(tokens))
    rounded = np.empty((num_images, num_tokens, token_dim), np.float32)
    values, scales = np.empty((1, layout.token_bytes), np.uint8), np.empty((1, layout.scale_bytes), np.uint8)
    for number, blob in enumerate(blobs):
        [error] = decode_blobs(layout, [blob], values, scales, [0])
        if error is not None:
            raise error
        rounded[number] = dequantize(layout, values[0], scales[0])
    return StoredTokens(storage, rounded, blobs, layout.token_bytes + layout.scale_bytes, layout.blob_bytes)


def _layout(model_digest: str, num_tokens: int, token_dim: int, storage: StorageType) -> BlobLayout:
    if storage not in get_args(StorageType):
        raise StorageImpossible(f"unknown storage {storage!r}: choose one of {', '.join(get_args(Storage))}")
    try:
        return BlobLayout(model_digest, num_tokens, token_dim, storage)
    except ValueError as error:
        raise StorageImpossible(f"these tokens cannot be stored as {storage}: {error}") from error


def _encoded(layout: BlobLayout, number: int, image: NDArray[np.float32]) -> bytes:
    try:
        return encode_blob(layout, image, _NO_SHA256)
    except ValueError as error:
        raise StorageImpossible(f"image {number} cannot be stored as {layout.storage}: {error}") from error


def _refuse_not_finite(tokens: NDArray[np.float32]) -> None:
    for number, image in enumerate(tokens):
        if not np.isfinite(image).all():
            raise StorageImpossible(f"image {number} has a visual token that is not finite")

"""The token blob: one image's visual tokens as one value of the store, and the key of that value.

A msgpack map of nine fields in a fixed order. In all blobs of one layout the bytes up to `checksum`, except the
position, are equal, and the fields after it are at fixed offsets. A valid blob is therefore read by two comparisons,
one checksum and two copies; msgpack is used only to describe the fault of an invalid one.

    version    2
    position   of the image's event (source_position.py); not part of the checksum
    model      digest of the model that made the tokens
    shape      [num_tokens, token_dim]
    storage    "fp16", "bf16", "int8" or "int4" (quantize.py defines the bytes)
    checksum   xxh3_64, big endian, over all bytes after it
    sha256     of the image file
    scales     laid out as in quantize.py, empty for fp16 and bf16
    tokens     laid out as in quantize.py

Knows neither the store nor the slab.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import msgpack
import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_digest

from protocols.blob_errors import (
    BlobCorrupt,
    BlobError,
    BlobMissing,
    BlobModelMismatch,
    BlobShapeMismatch,
    BlobStorageMismatch,
    BlobTruncated,
    BlobUndecodable,
    BlobVersionMismatch,
)
from protocols.fields import MAX_DIGEST_CHARS, MAX_TOKENS
from protocols.quantize import Bytes, StorageType, num_scale_bytes, num_token_bytes, quantize
from protocols.quantize import dequantize as _dequantize
from protocols.source_position import (
    HEAD_BYTES,
    VALUE_VERSION,
    SourcePosition,
    is_removal_marker,
    value_head,
)

__all__ = [
    "BLOB_VERSION",
    "BlobCorrupt",
    "BlobError",
    "BlobLayout",
    "BlobMissing",
    "BlobModelMismatch",
    "BlobShapeMismatch",
    "BlobStorageMismatch",
    "BlobTruncated",
    "BlobUndecodable",
    "BlobVersionMismatch",
    "blob_key",
    "blob_keys",
    "content_number",
    "content_sha256_of",
    "decode_blobs",
    "dequantize",
    "encode_blob",
]

BLOB_VERSION = VALUE_VERSION
_NUM_FIELDS = 9
#: All fields before the scales are within this number of bytes; an invalid blob is not parsed further.
_HEAD_BYTES = 512
_CHECKSUM_BYTES = 8
_SHA256_BYTES = 32
#: Bytes of a SHA-256 that tell two contents of one image apart.
CONTENT_NUMBER_BYTES = 8
_POSITION_BYTES = 16
_MAX_TOKEN_DIM = 65_536


@dataclass(frozen=True, slots=True)
class BlobLayout:
    """The fields that all blobs of one model and storage type share."""

    model_digest: str
    num_tokens: int
    token_dim: int
    storage: StorageType

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[!-~]{{1,{MAX_DIGEST_CHARS}}}", self.model_digest):
            raise ValueError(f"a model digest has 1 to {MAX_DIGEST_CHARS} visible ASCII characters")
        if not (1 <= self.num_tokens <= MAX_TOKENS and 1 <= self.token_dim <= _MAX_TOKEN_DIM):
            raise ValueError(
                f"{self.num_tokens} tokens of {self.token_dim} values: a blob holds 1 to {MAX_TOKENS} tokens of "
                f"1 to {_MAX_TOKEN_DIM} values"
            )
        if self.storage not in get_args(StorageType):
            raise ValueError(f"unknown storage {self.storage!r}; known: {', '.join(get_args(StorageType))}")
        num_token_bytes(self.storage, self.num_tokens, self.token_dim)

    @property
    def token_bytes(self) -> int:
        return num_token_bytes(self.storage, self.num_tokens, self.token_dim)

    @property
    def scale_bytes(self) -> int:
        return num_scale_bytes(self.storage, self.num_tokens, self.token_dim)

    @property
    def blob_bytes(self) -> int:
        return _frame_of(self).num_bytes


class _Frame(NamedTuple):
    """The constant bytes of one layout and where its variable bytes start."""

    start: bytes  # from the first byte to the header of the position, inclusive
    prefix: bytes  # from the end of the position to the header of the checksum, inclusive
    checksum_at: int
    before_scales: bytes
    before_tokens: bytes
    body_at: int
    sha256_at: int
    scales_at: int
    tokens_at: int
    num_bytes: int


@lru_cache(maxsize=64)
def _frame_of(layout: BlobLayout) -> _Frame:
    start = value_head(_NUM_FIELDS, SourcePosition())[:-_POSITION_BYTES]
    packer = msgpack.Packer(autoreset=False)
    for name, value in (
        ("model", layout.model_digest),
        ("shape", [layout.num_tokens, layout.token_dim]),
        ("storage", layout.storage),
    ):
        packer.pack(name)
        packer.pack(value)
    prefix = packer.bytes() + _field_start("checksum", _CHECKSUM_BYTES)
    checksum_at = HEAD_BYTES + len(prefix)
    body_at = checksum_at + _CHECKSUM_BYTES
    sha256_at = body_at + len(_BEFORE_SHA256)
    before_scales = _field_start("scales", layout.scale_bytes)
    before_tokens = _field_start("tokens", layout.token_bytes)
    scales_at = sha256_at + _SHA256_BYTES + len(before_scales)
    tokens_at = scales_at + layout.scale_bytes + len(before_tokens)
    num_bytes = tokens_at + layout.token_bytes
    return _Frame(
        start, prefix, checksum_at, before_scales, before_tokens, body_at, sha256_at, scales_at, tokens_at, num_bytes
    )


def _field_start(name: str, num_bytes: int) -> bytes:
    """Return the packed name of a field and the header of its byte string."""
    whole = msgpack.packb(name) + msgpack.packb(bytes(num_bytes))
    return whole[: len(whole) - num_bytes]


_BEFORE_SHA256 = _field_start("sha256", _SHA256_BYTES)


def encode_blob(
    layout: BlobLayout,
    tokens: NDArray[np.float32],
    content_sha256: bytes,
    position: SourcePosition = SourcePosition(),  # noqa: B008  # immutable
) -> bytes:
    """Return the blob of one image's `(m, d)` tokens, made from the event at `position`.

    Raises `ValueError` for another shape, or a value that is not finite or too large for the storage type.
    """
    if tokens.shape != (layout.num_tokens, layout.token_dim):
        raise ValueError(f"tokens of shape {tokens.shape}; expected ({layout.num_tokens}, {layout.token_dim})")
    if len(content_sha256) != _SHA256_BYTES:
        raise ValueError(f"a SHA-256 has {_SHA256_BYTES} bytes, not {len(content_sha256)}")
    frame = _frame_of(layout)
    token_bytes, scale_bytes = quantize(layout.storage, tokens)
    body = b"".join(
        (_BEFORE_SHA256, content_sha256, frame.before_scales, scale_bytes, frame.before_tokens, token_bytes)
    )
    return value_head(_NUM_FIELDS, position) + frame.prefix + xxh3_64_digest(body) + body


def decode_blobs(
    layout: BlobLayout,
    blobs: Sequence[bytes | None],
    tokens_out: NDArray[np.uint8],
    scales_out: NDArray[np.uint8],
    rows: Sequence[int],
) -> list[BlobError | None]:
    """Write blob i into row `rows[i]` of both arrays; return the error of each blob, None for a valid one.

    The arrays are C-contiguous, `(n, layout.token_bytes)` and `(n, layout.scale_bytes)`. The row of an invalid blob is
    not changed. Raises `ValueError` or `IndexError` only for arrays or rows that do not fit the layout.
    """
    token_bytes, scale_bytes = layout.token_bytes, layout.scale_bytes
    token_rows, scale_rows = _flat(tokens_out, token_bytes), _flat(scales_out, scale_bytes)
    if rows and not 0 <= min(rows) <= max(rows) < min(len(tokens_out), len(scales_out)):
        raise IndexError(f"rows {min(rows)} to {max(rows)} in arrays of {len(tokens_out)} rows")
    start, prefix, checksum_at, _, _, body_at, _, scales_at, tokens_at, num_bytes = _frame_of(layout)
    scales_end = scales_at + scale_bytes
    outcomes: list[BlobError | None] = []
    for blob, row in zip(blobs, rows, strict=True):
        if blob is None:
            outcomes.append(BlobMissing("the store has no blob"))
        elif len(blob) != num_bytes or not blob.startswith(start) or not blob.startswith(prefix, HEAD_BYTES):
            outcomes.append(_name_the_difference(layout, blob))
        else:
            view = memoryview(blob)
            if xxh3_64_digest(view[body_at:]) != blob[checksum_at:body_at]:
                outcomes.append(BlobCorrupt("the checksum does not match the content"))
                continue
            at = row * token_bytes
            token_rows[at : at + token_bytes] = view[tokens_at:]
            if scale_bytes:
                at = row * scale_bytes
                scale_rows[at : at + scale_bytes] = view[scales_at:scales_end]
            outcomes.append(None)
    return outcomes


def content_sha256_of(layout: BlobLayout, blob: bytes) -> bytes:
    """Return the SHA-256 of the image file from which a blob was made. Raises `BlobError` for an invalid blob."""
    # Decoded into temporary rows: a shared check would cost `decode_blobs` a function call for each blob.
    tokens, scales = np.empty((1, layout.token_bytes), np.uint8), np.empty((1, layout.scale_bytes), np.uint8)
    [error] = decode_blobs(layout, [blob], tokens, scales, [0])
    if error is not None:
        raise error
    at = _frame_of(layout).sha256_at
    return blob[at : at + _SHA256_BYTES]


def content_number(layout: BlobLayout, blob: bytes) -> int:
    """Return the end of the content's SHA-256 as a number; `blob` is one that `decode_blobs` found good."""
    end = _frame_of(layout).sha256_at + _SHA256_BYTES
    return int.from_bytes(blob[end - CONTENT_NUMBER_BYTES : end])


def dequantize(layout: BlobLayout, token_bytes: Bytes, scale_bytes: Bytes) -> NDArray[np.float32]:
    """Return the `(m, d)` tokens of one decoded row."""
    return _dequantize(layout.storage, layout.num_tokens, layout.token_dim, token_bytes, scale_bytes)


def _flat(rows: NDArray[np.uint8], row_bytes: int) -> memoryview:
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != row_bytes or not rows.flags.c_contiguous:
        raise ValueError(
            f"need a C-contiguous uint8 array with rows of {row_bytes} bytes, not {rows.dtype} {rows.shape}"
        )
    return rows.reshape(-1).data


def _name_the_difference(layout: BlobLayout, blob: bytes) -> BlobError:
    """Return the error of a blob whose first bytes or length differ from this layout's."""
    if is_removal_marker(blob):
        return BlobMissing("the image was removed")
    try:
        head = _read_head(blob)
    except BlobError as error:
        return error
    if head["model"] != layout.model_digest:
        return BlobModelMismatch(f"made by model {head['model']}; this worker uses model {layout.model_digest}")
    shape = [layout.num_tokens, layout.token_dim]
    if head["shape"] != shape:
        return BlobShapeMismatch(f"tokens of shape {head['shape']}; expected {shape}")
    if head["storage"] != layout.storage:
        return BlobStorageMismatch(f"stored as {head['storage']}; expected {layout.storage}")
    if len(blob) < layout.blob_bytes:
        return BlobTruncated(f"{len(blob)} bytes; expected {layout.blob_bytes}")
    return BlobUndecodable("valid fields in another encoding than this version writes")


#: The fields of the head in their order, each with the check of its value.
_IS_VALID: dict[str, Any] = {
    "version": lambda value: type(value) is int,
    "position": lambda value: type(value) is bytes and len(value) == _POSITION_BYTES,
    "model": lambda value: type(value) is str,
    "shape": lambda value: type(value) is list and len(value) == 2 and all(type(n) is int for n in value),
    "storage": lambda value: value in get_args(StorageType),
    "checksum": lambda value: type(value) is bytes and len(value) == _CHECKSUM_BYTES,
    "sha256": lambda value: type(value) is bytes and len(value) == _SHA256_BYTES,
}


def _read_head(blob: bytes) -> dict[str, Any]:
    """Return the fields before the scales. Raises `BlobError`."""
    first_bytes = blob[:_HEAD_BYTES]
    unpacker = msgpack.Unpacker(max_buffer_size=_HEAD_BYTES, max_ext_len=0, max_array_len=2, max_map_len=0)
    unpacker.feed(first_bytes)
    fields: dict[str, Any] = {}
    try:
        unpacker.read_map_header()
        for name, is_valid in _IS_VALID.items():
            if unpacker.unpack() != name:
                raise BlobUndecodable(f"not a token blob: the field {name} is not at its position")
            fields[name] = unpacker.unpack()
            if not is_valid(fields[name]):
                raise BlobUndecodable(f"not a token blob: the field {name} is invalid")
            if name == "version" and fields[name] != BLOB_VERSION:  # the other fields depend on the version
                raise BlobVersionMismatch(f"blob of version {fields[name]}; this worker reads version {BLOB_VERSION}")
    except msgpack.OutOfData:
        raise BlobTruncated(f"ends after {len(first_bytes)} bytes, before the tokens") from None
    except BlobError:
        raise
    except (ValueError, msgpack.UnpackException):
        raise BlobUndecodable("not a token blob: not a msgpack map") from None
    return fields


def blob_key(model_digest: str, image_id: str) -> str:
    """Return the store's key of one image's blob under one model."""
    return f"vt:{model_digest}:{image_id}"


def blob_keys(model_digest: str, image_ids: Iterable[str]) -> list[str]:
    """Return the keys of many images, in order."""
    prefix = blob_key(model_digest, "")
    return [prefix + image_id for image_id in image_ids]

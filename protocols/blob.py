"""The token blob: one image's visual tokens in one value of the store.

A msgpack map of eight fields in a fixed order. For one layout everything up to `checksum` is the same bytes, and what
follows sits at fixed offsets, so a good blob is read by one comparison, one checksum and two copies; msgpack is
only asked when something is wrong, to name it.

    version    1
    model      digest of the model that made the tokens
    shape      [num_tokens, token_dim]
    storage    "fp16", "bf16", "int8" or "int4" (quantize.py says what the bytes are)
    checksum   xxh3_64, big endian, over every byte behind it
    sha256     of the image file
    scales     as quantize.py lays them out, empty for fp16 and bf16
    tokens     likewise

Knows nothing of the store, of keys and of the slab.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    "content_sha256_of",
    "decode_blobs",
    "dequantize",
    "encode_blob",
]

BLOB_VERSION = 1
#: All that is looked at to name what is wrong: every field ahead of the scales lies within these first bytes.
_HEAD_BYTES = 512
_CHECKSUM_BYTES = 8
_SHA256_BYTES = 32
_MAX_TOKEN_DIM = 65_536


@dataclass(frozen=True, slots=True)
class BlobLayout:
    """What a worker expects of every blob it reads and gives every blob it writes."""

    model_digest: str
    num_tokens: int
    token_dim: int
    storage: StorageType

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[!-~]{{1,{MAX_DIGEST_CHARS}}}", self.model_digest):
            raise ValueError(f"a model digest is 1 to {MAX_DIGEST_CHARS} visible ASCII characters")
        if not (1 <= self.num_tokens <= MAX_TOKENS and 1 <= self.token_dim <= _MAX_TOKEN_DIM):
            raise ValueError(f"{self.num_tokens} tokens of {self.token_dim} values are out of bounds")
        if self.storage not in get_args(StorageType):
            raise ValueError(f"storage {self.storage!r} is none of {', '.join(get_args(StorageType))}")
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

    prefix: bytes  # up to and with the header of the checksum
    before_scales: bytes
    before_tokens: bytes
    body_at: int
    sha256_at: int
    scales_at: int
    tokens_at: int
    num_bytes: int


@lru_cache(maxsize=64)
def _frame_of(layout: BlobLayout) -> _Frame:
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(8)
    for name, value in (
        ("version", BLOB_VERSION),
        ("model", layout.model_digest),
        ("shape", [layout.num_tokens, layout.token_dim]),
        ("storage", layout.storage),
    ):
        packer.pack(name)
        packer.pack(value)
    prefix = packer.bytes() + _field_start("checksum", _CHECKSUM_BYTES)
    body_at = len(prefix) + _CHECKSUM_BYTES
    sha256_at = body_at + len(_BEFORE_SHA256)
    before_scales = _field_start("scales", layout.scale_bytes)
    before_tokens = _field_start("tokens", layout.token_bytes)
    scales_at = sha256_at + _SHA256_BYTES + len(before_scales)
    tokens_at = scales_at + layout.scale_bytes + len(before_tokens)
    num_bytes = tokens_at + layout.token_bytes
    return _Frame(prefix, before_scales, before_tokens, body_at, sha256_at, scales_at, tokens_at, num_bytes)


def _field_start(name: str, num_bytes: int) -> bytes:
    """The name of a field and the header of its byte string, without the bytes."""
    whole = msgpack.packb(name) + msgpack.packb(bytes(num_bytes))
    return whole[: len(whole) - num_bytes]


_BEFORE_SHA256 = _field_start("sha256", _SHA256_BYTES)


def encode_blob(layout: BlobLayout, tokens: NDArray[np.float32], content_sha256: bytes) -> bytes:
    """Return the blob of one image's `(m, d)` tokens.

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
    return frame.prefix + xxh3_64_digest(body) + body


def decode_blobs(
    layout: BlobLayout,
    blobs: Sequence[bytes | None],
    tokens_out: NDArray[np.uint8],
    scales_out: NDArray[np.uint8],
    rows: Sequence[int],
) -> list[BlobError | None]:
    """Write blob i into row `rows[i]` of both arrays and say for each what was wrong with it, None if nothing.

    The arrays are C-contiguous, `(n, layout.token_bytes)` and `(n, layout.scale_bytes)`. A row whose blob is bad is
    left as it was. Raises `ValueError` or `IndexError` only for arrays or rows that do not fit the layout.
    """
    token_bytes, scale_bytes = layout.token_bytes, layout.scale_bytes
    token_rows, scale_rows = _flat(tokens_out, token_bytes), _flat(scales_out, scale_bytes)
    if rows and not 0 <= min(rows) <= max(rows) < min(len(tokens_out), len(scales_out)):
        raise IndexError(f"rows {min(rows)} to {max(rows)} of arrays with {len(tokens_out)}")
    prefix, _, _, body_at, _, scales_at, tokens_at, num_bytes = _frame_of(layout)
    scales_end = scales_at + scale_bytes
    checksum_at = len(prefix)
    outcomes: list[BlobError | None] = []
    for blob, row in zip(blobs, rows, strict=True):
        if blob is None:
            outcomes.append(BlobMissing("no blob in the store"))
        elif len(blob) != num_bytes or not blob.startswith(prefix):
            outcomes.append(_name_the_difference(layout, blob))
        else:
            view = memoryview(blob)
            if xxh3_64_digest(view[body_at:]) != blob[checksum_at:body_at]:
                outcomes.append(BlobCorrupt("the checksum does not fit the content"))
                continue
            at = row * token_bytes
            token_rows[at : at + token_bytes] = view[tokens_at:]
            if scale_bytes:
                at = row * scale_bytes
                scale_rows[at : at + scale_bytes] = view[scales_at:scales_end]
            outcomes.append(None)
    return outcomes


def content_sha256_of(layout: BlobLayout, blob: bytes) -> bytes:
    """Return the SHA-256 of the image file that a good blob was made from; raises the `BlobError` of any other."""
    # Decoded into rows that nobody reads: a check shared as a function would cost `decode_blobs` a call for each blob.
    tokens, scales = np.empty((1, layout.token_bytes), np.uint8), np.empty((1, layout.scale_bytes), np.uint8)
    [error] = decode_blobs(layout, [blob], tokens, scales, [0])
    if error is not None:
        raise error
    at = _frame_of(layout).sha256_at
    return blob[at : at + _SHA256_BYTES]


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
    """Say why a blob that does not start like this layout, or is not as long, cannot be used."""
    try:
        head = _read_head(blob)
    except BlobError as error:
        return error
    if head["model"] != layout.model_digest:
        return BlobModelMismatch(f"made by model {head['model']}; this worker runs {layout.model_digest}")
    shape = [layout.num_tokens, layout.token_dim]
    if head["shape"] != shape:
        return BlobShapeMismatch(f"holds tokens of shape {head['shape']}; expected {shape}")
    if head["storage"] != layout.storage:
        return BlobStorageMismatch(f"stored as {head['storage']}; expected {layout.storage}")
    if len(blob) < layout.blob_bytes:
        return BlobTruncated(f"{len(blob)} bytes; expected {layout.blob_bytes}")
    return BlobUndecodable("right fields in another form than this version writes")


#: The fields of the head in their order, and what each must be for the rest of this module to trust it.
_IS_VALID: dict[str, Any] = {
    "version": lambda value: type(value) is int,
    "model": lambda value: type(value) is str,
    "shape": lambda value: type(value) is list and len(value) == 2 and all(type(n) is int for n in value),
    "storage": lambda value: value in get_args(StorageType),
    "checksum": lambda value: type(value) is bytes and len(value) == _CHECKSUM_BYTES,
    "sha256": lambda value: type(value) is bytes and len(value) == _SHA256_BYTES,
}


def _read_head(blob: bytes) -> dict[str, Any]:
    """Read the fields ahead of the scales; raises `BlobError`."""
    first_bytes = blob[:_HEAD_BYTES]
    unpacker = msgpack.Unpacker(max_buffer_size=_HEAD_BYTES, max_ext_len=0, max_array_len=2, max_map_len=0)
    unpacker.feed(first_bytes)
    fields: dict[str, Any] = {}
    try:
        unpacker.read_map_header()
        for name, is_valid in _IS_VALID.items():
            if unpacker.unpack() != name:
                raise BlobUndecodable(f"not a token blob: no field {name} where it should be")
            fields[name] = unpacker.unpack()
            if not is_valid(fields[name]):
                raise BlobUndecodable(f"not a token blob: field {name} holds something else")
            if name == "version" and fields[name] != BLOB_VERSION:  # before the rest: it may go on in any way
                raise BlobVersionMismatch(f"blob of version {fields[name]}; this reads version {BLOB_VERSION}")
    except msgpack.OutOfData:
        raise BlobTruncated(f"ends after {len(first_bytes)} bytes, inside its head") from None
    except BlobError:
        raise
    except (ValueError, msgpack.UnpackException):
        raise BlobUndecodable("not a token blob: not a msgpack map") from None
    return fields

"""Reads and verifies the files of a checkpoint folder.

Knows neither torch nor the model, so that reading a digest or a configuration imports little; `edje.model.weights`
saves and loads the model.

    config.json        format version, model digest, configuration
    model.safetensors  the weights
    tokenizer.json     the tokenizer, in the `tokenizers` library's format
    vision.onnx        the graph of a vision tower of kind onnx

Errors:

    CheckpointError
      CheckpointMissing     the folder does not exist or holds no checkpoint
      CheckpointIncomplete  a file is missing or cut off, such as by an unfinished copy
      CheckpointTampered    the content does not match the recorded digest
      CheckpointMismatch    the files do not belong together, or another version wrote them
      CheckpointExists      saving would overwrite files
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from edje.config import EdjeConfig, canonical_json, parse_config
from protocols.validation import first_problem

#: Increased with every new field of a configuration: a digest covers all fields, so an older digest would not match.
FORMAT_VERSION = 3
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
GRAPH_FILE = "vision.onnx"
#: Hexadecimal digits of a digest (64 bits) in store keys and replies.
DIGEST_CHARS = 16
#: The safetensors library's limit for a header.
_MAX_HEADER_BYTES = 100_000_000
#: Weights are hashed in pieces of this size: large enough for full speed, small compared with any model.
_CHUNK_BYTES = 1 << 20


class CheckpointError(Exception):
    """Base class of all errors about checkpoints; the message says what is wrong and what to do."""


class CheckpointMissing(CheckpointError):
    """The folder does not exist or holds no checkpoint."""


class CheckpointIncomplete(CheckpointError):
    """A file is missing or cut off."""


class CheckpointTampered(CheckpointError):
    """The content does not match the recorded digest."""


class CheckpointMismatch(CheckpointError):
    """The files do not belong together, or another version wrote them."""


class CheckpointExists(CheckpointError):
    """Saving would overwrite files."""


class Envelope(BaseModel):
    """The content of `config.json`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format_version: int
    model_digest: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{DIGEST_CHARS}}}$")]
    config: dict[str, object]


class _TensorEntry(BaseModel):
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


_HEADER = TypeAdapter(dict[str, _TensorEntry])


def read_config(checkpoint: Path) -> EdjeConfig:
    """The configuration of a checkpoint folder; reads no other file."""
    return _read_envelope(checkpoint)[1]


def read_tokenizer_json(checkpoint: Path) -> str:
    """The tokenizer of a checkpoint folder as JSON."""
    return _read(checkpoint, TOKENIZER_FILE)


def read_graph(checkpoint: Path, config: EdjeConfig) -> bytes | None:
    """The ONNX graph of a vision tower of kind onnx; None for every other kind."""
    if config.vision.kind != "onnx":
        return None
    path = checkpoint / GRAPH_FILE
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointIncomplete(f"{path} cannot be read: {error.strerror}") from error


def read_digest(checkpoint: Path) -> str:
    """The model digest, computed over the content and compared with the recorded one."""
    recorded, config = _read_envelope(checkpoint)
    computed = digest_of(checkpoint, config)
    if computed != recorded:
        raise CheckpointTampered(
            f"{checkpoint} was saved as model {recorded}, but its content has the digest {computed}: "
            "a file was changed or belongs to another model; copy the whole folder again"
        )
    return recorded


def digest_of(checkpoint: Path, config: EdjeConfig) -> str:
    """SHA-256 over configuration, tokenizer, ONNX graph if any, and each tensor's name, type, shape and bytes.

    File names and the order and metadata of the weights' file do not change it.
    """
    digest = hashlib.sha256(b"edje checkpoint\n")
    try:
        tokenizer = json.dumps(json.loads(read_tokenizer_json(checkpoint)), sort_keys=True)
    except ValueError as error:
        raise CheckpointIncomplete(
            f"{checkpoint / TOKENIZER_FILE} is cut off or damaged ({error}): copy the whole folder again"
        ) from error
    for part in (canonical_json(config), tokenizer):
        digest.update(hashlib.sha256(part.encode()).digest())
    graph = read_graph(checkpoint, config)
    if graph is not None:
        digest.update(hashlib.sha256(graph).digest())
    path = checkpoint / WEIGHTS_FILE
    try:
        with path.open("rb") as file:
            entries, start = _read_header(file, path)
            for name, entry in sorted(entries.items()):
                tensor = hashlib.sha256(f"{name} {entry.dtype} {entry.shape}\n".encode())
                file.seek(start + entry.data_offsets[0])
                num_left = entry.data_offsets[1] - entry.data_offsets[0]
                while num_left > 0:
                    piece = file.read(min(num_left, _CHUNK_BYTES))
                    if not piece:
                        raise CheckpointIncomplete(f"{path} ends within {name}: copy the whole folder again")
                    tensor.update(piece)
                    num_left -= len(piece)
                digest.update(tensor.digest())
    except OSError as error:
        raise CheckpointIncomplete(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:DIGEST_CHARS]


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, _TensorEntry], int]:
    """The tensors' entries in the header of a safetensors file, and the offset of their data."""
    prefix = file.read(8)
    num_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < num_bytes <= _MAX_HEADER_BYTES:
        raise CheckpointIncomplete(f"{path} is not a safetensors file: copy the whole folder again")
    try:
        header = json.loads(file.read(num_bytes))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return _HEADER.validate_python(tensors), 8 + num_bytes
    except (ValueError, AttributeError) as error:
        raise CheckpointIncomplete(f"{path} has no readable header: copy the whole folder again") from error


def _read_envelope(checkpoint: Path) -> tuple[str, EdjeConfig]:
    """The recorded digest and the configuration."""
    if not (checkpoint / CONFIG_FILE).is_file():
        raise CheckpointMissing(
            f"{checkpoint} holds no checkpoint ({CONFIG_FILE} is missing): "
            "give the folder that `python -m edje.init` or training wrote"
        )
    text = _read(checkpoint, CONFIG_FILE)
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise CheckpointIncomplete(
            f"{checkpoint / CONFIG_FILE} is cut off or damaged ({error}): copy the whole folder again"
        ) from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{checkpoint} has checkpoint format {version!r}, and this version reads {FORMAT_VERSION}: "
            "use the version that wrote it, or another checkpoint"
        )
    try:
        envelope = Envelope.model_validate(raw)
        return envelope.model_digest, parse_config(json.dumps(envelope.config))
    except ValidationError as error:
        raise CheckpointMismatch(
            f"{checkpoint / CONFIG_FILE} does not describe a model that this version can load: {first_problem(error)}"
        ) from error


def _read(checkpoint: Path, name: str) -> str:
    try:
        return (checkpoint / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointIncomplete(f"{checkpoint / name} cannot be read: {error}") from error

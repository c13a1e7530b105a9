"""A checkpoint folder as files: where things are, what they hash to, and what is wrong with them.

Knows neither torch nor the model, so that reading a digest or a configuration is cheap to import; `edje.model.weights`
saves and loads the model itself.

    config.json        format version, model digest, configuration
    model.safetensors  the weights
    tokenizer.json     the tokenizer, in the `tokenizers` library's format
    vision.onnx        the vision tower's graph, where the tower is one

Errors:

    CheckpointError
      CheckpointMissing     there is no such folder, or it holds no checkpoint
      CheckpointIncomplete  a file is missing or cut off: copied half, or still being written
      CheckpointTampered    the files are whole, but not the ones the digest was taken of
      CheckpointMismatch    the parts do not fit together, or another version wrote them
      CheckpointExists      saving would overwrite something
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

#: Grows with the fields of a configuration: digests are taken over all of them, so an older one's would not agree.
FORMAT_VERSION = 3
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
GRAPH_FILE = "vision.onnx"
#: Hexadecimal digits of a digest: 64 bits, as it stands in store keys and replies.
DIGEST_CHARS = 16
#: The limit that the safetensors library itself sets for a header.
_MAX_HEADER_BYTES = 100_000_000
#: Weights are hashed in pieces of this size: large enough to be read at full speed, small beside any model.
_CHUNK_BYTES = 1 << 20


class CheckpointError(Exception):
    """Root of what can be wrong with a checkpoint; the message is a sentence for whoever deploys it."""


class CheckpointMissing(CheckpointError):
    """There is no such folder, or it holds no checkpoint."""


class CheckpointIncomplete(CheckpointError):
    """A file is missing or cut off."""


class CheckpointTampered(CheckpointError):
    """The content is not the one the digest was taken of."""


class CheckpointMismatch(CheckpointError):
    """The parts do not fit together, or another version wrote them."""


class CheckpointExists(CheckpointError):
    """Saving would overwrite something."""


class Envelope(BaseModel):
    """What `config.json` holds."""

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
    """The configuration of a checkpoint folder; nothing else of it is looked at."""
    return _read_envelope(checkpoint)[1]


def read_tokenizer_json(checkpoint: Path) -> str:
    """The stored tokenizer, as text."""
    return _read(checkpoint, TOKENIZER_FILE)


def read_graph(checkpoint: Path, config: EdjeConfig) -> bytes | None:
    """The content of the vision tower's ONNX graph; None where the tower is none."""
    if config.vision.kind != "onnx":
        return None
    path = checkpoint / GRAPH_FILE
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointIncomplete(f"{path} cannot be read: {error.strerror}") from error


def read_digest(checkpoint: Path) -> str:
    """The model digest, taken anew over the whole content and compared with the recorded one."""
    recorded, config = _read_envelope(checkpoint)
    computed = digest_of(checkpoint, config)
    if computed != recorded:
        raise CheckpointTampered(
            f"{checkpoint} was saved as model {recorded} but its content is {computed}: "
            "a file was changed or belongs to another model; copy the whole folder again"
        )
    return recorded


def digest_of(checkpoint: Path, config: EdjeConfig) -> str:
    """SHA-256 over what the model is: configuration, tokenizer, and each tensor's name, type, shape and bytes.

    A tower's ONNX graph counts byte by byte. Neither file names nor the order or metadata of the weights' file count.
    """
    digest = hashlib.sha256(b"edje checkpoint\n")
    try:
        tokenizer = json.dumps(json.loads(read_tokenizer_json(checkpoint)), sort_keys=True)
    except ValueError as error:
        raise CheckpointIncomplete(f"{checkpoint / TOKENIZER_FILE} is not whole: {error}") from error
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
    """The table of contents of a safetensors file, and where the tensors begin."""
    prefix = file.read(8)
    num_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < num_bytes <= _MAX_HEADER_BYTES:
        raise CheckpointIncomplete(f"{path} does not begin like a safetensors file: copy the whole folder again")
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
        raise CheckpointIncomplete(f"{checkpoint / CONFIG_FILE} is not whole: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{checkpoint} has checkpoint format {version!r}, this program reads {FORMAT_VERSION}: "
            "use the version that wrote it, or another checkpoint"
        )
    try:
        envelope = Envelope.model_validate(raw)
        return envelope.model_digest, parse_config(json.dumps(envelope.config))
    except ValidationError as error:
        raise CheckpointMismatch(
            f"{checkpoint / CONFIG_FILE} describes no model this program knows: {first_problem(error)}"
        ) from error


def _read(checkpoint: Path, name: str) -> str:
    try:
        return (checkpoint / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointIncomplete(f"{checkpoint / name} cannot be read: {error}") from error

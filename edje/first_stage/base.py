"""The interface of first-stage encoders, and their folder in a checkpoint.

    first_stage/config.json          kind, configuration, digest of the weights
    first_stage/model.safetensors    the weights

The folder is not part of the model digest, because neither tokens nor logits depend on it. `edje.first_stage.load`
reads it for every kind.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from edje.checkpoint import CheckpointIncomplete, CheckpointMismatch, CheckpointTampered
from protocols.validation import first_problem

FOLDER, CONFIG_FILE, _WEIGHTS = "first_stage", "config.json", "model.safetensors"

Vectors = NDArray[np.float32]
_Config = TypeVar("_Config")
_Module = TypeVar("_Module", bound=nn.Module)


class FirstStageEncoder(nn.Module, ABC):
    """Embeds captions and images as vectors of unit length; their dot product ranks the candidates."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width e of the vectors."""

    @abstractmethod
    def caption_vectors(self, captions: Sequence[str], text_ids: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of captions, (C, e).

        Each caption comes as text and as ids of the joint encoder's tokenizer; an encoder reads one of the two.
        """

    @abstractmethod
    def image_vectors(self, pooled: NDArray[np.floating]) -> Vectors:
        """Vectors of images, (N, e), from the tower's pooled embeddings (N, E)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the encoder into an empty folder."""


def save_first_stage(checkpoint: Path, encoder: FirstStageEncoder) -> None:
    """Write `first_stage/` into a checkpoint folder that has none."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    encoder.save(folder)


def write_folder(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the weights, then config.json with these fields and the digest of the weights."""
    data = safetensors.torch.save({name: each.detach().cpu().contiguous() for name, each in tensors.items()})
    (folder / _WEIGHTS).write_bytes(data)
    fields = fields | {"weights_sha256": hashlib.sha256(data).hexdigest()}
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def read_folder(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The fields of config.json and the verified content of the weights' file. Raises `CheckpointError`."""
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        data = (folder / _WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointIncomplete(f"{folder} cannot be read ({error}): copy the whole folder again") from error
    if not isinstance(fields, dict):
        raise CheckpointMismatch(f"{folder / CONFIG_FILE} does not describe a first stage")
    if hashlib.sha256(data).hexdigest() != fields.get("weights_sha256"):
        raise CheckpointTampered(f"{folder / _WEIGHTS} is not the file that was saved: copy the whole folder again")
    return fields, data


def parse_config(folder: Path, kind: type[_Config], fields: object) -> _Config:
    """The encoder's configuration from the fields of config.json. Raises `CheckpointMismatch`."""
    try:
        parsed: _Config = TypeAdapter(kind).validate_json(json.dumps(fields))
    except ValidationError as error:
        raise CheckpointMismatch(
            f"{folder / CONFIG_FILE} does not describe a first stage that this version can load: "
            f"{first_problem(error, root='config')}"
        ) from error
    return parsed


def load_weights(folder: Path, module: _Module, data: bytes) -> _Module:
    """The module with these weights, frozen. Raises `CheckpointMismatch`."""
    try:
        module.load_state_dict(safetensors.torch.load(data), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointMismatch(f"{folder} holds weights of another first stage: {error}") from error
    return module.eval().requires_grad_(False)

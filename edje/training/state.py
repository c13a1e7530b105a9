"""A run's resumable state on the disk: weights and optimizer as safetensors, written atomically.

    state/00001200/   tensors.safetensors, state.json (with a digest of both files)

The latest two states are kept. A damaged state is reported and skipped, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from edje.files import draft_directory

_TENSORS, _STATE = "tensors.safetensors", "state.json"
_NUM_KEPT = 2
_Number = Annotated[int, Field(ge=0)]


class StateError(RuntimeError):
    """The saved state belongs to another run; the message says what to do."""


@dataclass(frozen=True, slots=True)
class RunPosition:
    """How far a run has come: steps done in this phase, and in total.

    A phase ends with its validation; after it, the position is step 0 of the next phase.
    """

    phase: _Number
    step: _Number
    total_step: _Number
    num_lines: _Number = 0  # lines of metrics written
    score_statistics: tuple[float, float] | None = None  # mean and deviation by which the head standardises scores


@dataclass(frozen=True, slots=True)
class SavedState:
    """A complete saved state."""

    position: RunPosition
    tensors: dict[str, Tensor]


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    position: RunPosition
    recipe: str
    sha256: str


def save_state(
    folder: Path, position: RunPosition, recipe_digest: str, module: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write the state of this position. Removes states of later steps, which belong to an abandoned continuation."""
    tensors = {f"module.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    if optimizer is not None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"optimizer.{slot}.{names[id(parameter)]}"] = torch.as_tensor(value)
    final = folder / f"{position.total_step:08d}"
    data = safetensors.torch.save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})
    envelope = _Envelope(position=position, recipe=recipe_digest, sha256=_digest(position, recipe_digest, data))
    with draft_directory(final) as draft:
        (draft / _TENSORS).write_bytes(data)
        (draft / _STATE).write_text(envelope.model_dump_json(), encoding="utf-8")
    states = sorted(folder.glob("[0-9]*"))
    current = states.index(final)
    for other in states[: max(0, current + 1 - _NUM_KEPT)] + states[current + 1 :]:
        shutil.rmtree(other)


def find_state(folder: Path, recipe_digest: str) -> tuple[SavedState | None, list[str]]:
    """The latest complete state, if there is one, and a sentence for each damaged state.

    Raises `StateError` for the state of another recipe.
    """
    damaged = []
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
        try:
            envelope = _Envelope.model_validate_json((path / _STATE).read_bytes())
            data = (path / _TENSORS).read_bytes()
        except (OSError, ValidationError) as error:
            cause = str(error) if isinstance(error, OSError) else f"{_STATE} is damaged or of another version"
            damaged.append(f"{path} is incomplete ({cause}) and is skipped")
            continue
        if _digest(envelope.position, envelope.recipe, data) != envelope.sha256:
            damaged.append(f"{path} was changed or truncated and is skipped")
            continue
        if envelope.recipe != recipe_digest:
            raise StateError(
                f"{path} belongs to another recipe: use the recipe that the run began with, or another output folder"
            )
        return SavedState(envelope.position, safetensors.torch.load(data)), damaged
    return None, damaged


def restore_module(state: SavedState, module: nn.Module) -> None:
    """Load the saved weights into the module. Raises `StateError` if they do not fit."""
    prefix = "module."
    weights = {name.removeprefix(prefix): each for name, each in state.tensors.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise StateError(
            "the saved state does not fit the model that this version builds from the recipe: continue with the "
            f"version that began the run, or use another output folder ({str(error)[:300]})"
        ) from error


def restore_optimizer(state: SavedState, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the saved moments into an optimizer of the same parameters."""
    parameters = dict(module.named_parameters())
    for name, tensor in state.tensors.items():
        if name.startswith("optimizer."):
            _, slot, parameter = name.split(".", 2)
            target = parameters[parameter]
            # AdamW keeps its step count on the CPU on every device.
            optimizer.state[target][slot] = tensor.clone() if slot == "step" else tensor.to(target.device, copy=True)


def _digest(position: RunPosition, recipe_digest: str, data: bytes) -> str:
    fields = json.dumps([asdict(position), recipe_digest], sort_keys=True)
    return hashlib.sha256(fields.encode() + b"\n" + data).hexdigest()

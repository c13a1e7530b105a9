"""A run's resumable state on disk: weights and optimizer as safetensors, written whole or not at all.

    state/00001200/   tensors.safetensors, state.json (written last, with a digest over everything)

The last two are kept; one that a kill or a full disk left half-written, or that was changed, is passed over with a
warning, and the one before it is used.
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
    """There is state, but not of this run; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run stands: so many steps of this phase are done, and so many in all.

    A phase is over when it was validated; the run then stands at the beginning of the next one.
    """

    phase: _Number
    step: _Number
    total_step: _Number
    num_lines: _Number = 0  # of metrics that were written so far
    score_spread: tuple[float, float] | None = None  # mean and deviation that the head standardises scores by


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state that was found whole."""

    place: Place
    tensors: dict[str, Tensor]


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    place: Place
    recipe: str
    sha256: str


def save_state(
    folder: Path, place: Place, recipe_digest: str, module: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write the state of this step. What is there of later steps belongs to a run that went another way, and goes."""
    tensors = {f"module.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    if optimizer is not None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"optimizer.{slot}.{names[id(parameter)]}"] = torch.as_tensor(value)
    final = folder / f"{place.total_step:08d}"
    data = safetensors.torch.save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})
    envelope = _Envelope(place=place, recipe=recipe_digest, sha256=_digest(place, recipe_digest, data))
    with draft_directory(final) as draft:
        (draft / _TENSORS).write_bytes(data)
        (draft / _STATE).write_text(envelope.model_dump_json(), encoding="utf-8")
    states = sorted(folder.glob("[0-9]*"))
    now = states.index(final)
    for other in states[: max(0, now + 1 - _NUM_KEPT)] + states[now + 1 :]:
        shutil.rmtree(other)


def find_state(folder: Path, recipe_digest: str) -> tuple[SavedState | None, list[str]]:
    """The latest whole state, if there is one, and what was passed over on the way, in sentences.

    Raises `StateError` for the state of another recipe.
    """
    passed_over = []
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
        try:
            envelope = _Envelope.model_validate_json((path / _STATE).read_bytes())
            data = (path / _TENSORS).read_bytes()
        except (OSError, ValidationError) as error:
            cause = str(error) if isinstance(error, OSError) else f"{_STATE} is not what was written"
            passed_over.append(f"{path} is not whole ({cause}) and is passed over")
            continue
        if _digest(envelope.place, envelope.recipe, data) != envelope.sha256:
            passed_over.append(f"{path} was changed or cut off and is passed over")
            continue
        if envelope.recipe != recipe_digest:
            raise StateError(
                f"{path} belongs to another recipe: give the recipe it was begun with, or another output folder"
            )
        return SavedState(envelope.place, safetensors.torch.load(data)), passed_over
    return None, passed_over


def restore_module(state: SavedState, module: nn.Module) -> None:
    """Put the saved weights into the module. Raises `StateError` if this program builds another one."""
    prefix = "module."
    weights = {name.removeprefix(prefix): each for name, each in state.tensors.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise StateError(
            "the saved state is of a model that this version of the program no longer builds from the recipe: go on "
            f"with the version that began, or give another output folder ({str(error)[:300]})"
        ) from error


def restore_optimizer(state: SavedState, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments into an optimizer over the same parameters."""
    parameters = dict(module.named_parameters())
    for name, tensor in state.tensors.items():
        if name.startswith("optimizer."):
            _, slot, parameter = name.split(".", 2)
            target = parameters[parameter]
            # AdamW keeps its step count on the CPU whatever the parameters' device.
            optimizer.state[target][slot] = tensor.clone() if slot == "step" else tensor.to(target.device, copy=True)


def _digest(place: Place, recipe_digest: str, data: bytes) -> str:
    told = json.dumps([asdict(place), recipe_digest], sort_keys=True)
    return hashlib.sha256(told.encode() + b"\n" + data).hexdigest()

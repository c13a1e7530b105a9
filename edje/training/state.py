"""A run's resumable state on disk: weights and optimizer as safetensors, written whole or not at all.

    state/00001200/   tensors.safetensors, state.json (written last, with the digest of the other)

The last two are kept; one that a kill or a full disk left half-written, or that was changed, is passed over with a
warning, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

_TENSORS, _STATE = "tensors.safetensors", "state.json"
_NUM_KEPT = 2


class StateError(RuntimeError):
    """There is state, but not of this run; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run stands: so many steps of this phase are done, and so many in all."""

    phase: int
    step: int
    total_step: int


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state that was found whole."""

    place: Place
    tensors: dict[str, Tensor]


def save_state(
    folder: Path, place: Place, recipe_digest: str, module: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write the state of this step."""
    tensors = {f"module.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    if optimizer is not None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"optimizer.{slot}.{names[id(parameter)]}"] = torch.as_tensor(value)
    final = folder / f"{place.total_step:08d}"
    draft = folder / f".{final.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    data = safetensors.torch.save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})
    (draft / _TENSORS).write_bytes(data)
    told = {"place": asdict(place), "recipe": recipe_digest, "sha256": hashlib.sha256(data).hexdigest()}
    (draft / _STATE).write_text(json.dumps(told), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    for old in sorted(folder.glob("[0-9]*"))[:-_NUM_KEPT]:
        shutil.rmtree(old)


def find_state(folder: Path, recipe_digest: str) -> tuple[SavedState | None, list[str]]:
    """The latest whole state, if there is one, and what was passed over on the way, in sentences.

    Raises `StateError` for the state of another recipe.
    """
    passed_over = []
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
        try:
            told = json.loads((path / _STATE).read_text(encoding="utf-8"))
            data = (path / _TENSORS).read_bytes()
            place, recipe, wanted = Place(**told["place"]), told["recipe"], told["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            passed_over.append(f"{path} is not whole ({error}) and is passed over")
            continue
        if hashlib.sha256(data).hexdigest() != wanted:
            passed_over.append(f"{path} was changed or cut off and is passed over")
            continue
        if recipe != recipe_digest:
            raise StateError(
                f"{path} belongs to another recipe: give the recipe it was begun with, or another output folder"
            )
        return SavedState(place, safetensors.torch.load(data)), passed_over
    return None, passed_over


def restore_module(state: SavedState, module: nn.Module) -> None:
    """Put the saved weights into the module."""
    prefix = "module."
    module.load_state_dict({n.removeprefix(prefix): t for n, t in state.tensors.items() if n.startswith(prefix)})


def restore_optimizer(state: SavedState, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments into an optimizer over the same parameters."""
    parameters = dict(module.named_parameters())
    for name, tensor in state.tensors.items():
        if name.startswith("optimizer."):
            _, slot, parameter = name.split(".", 2)
            target = parameters[parameter]
            # AdamW keeps its step count on the CPU whatever the parameters' device.
            optimizer.state[target][slot] = tensor.clone() if slot == "step" else tensor.to(target.device, copy=True)

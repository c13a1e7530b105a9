"""A run's resumable state on the disk: weights and optimizer as safetensors, written atomically.

    state/00001200/        tensors.safetensors, state.json (with a digest of both files)
    state/best.safetensors weights of the best validation of the current phase

The latest two states are kept. A damaged state is reported and skipped, and the one before it is used. A published
tower is not part of the state, because it never changes: the state has its digest.
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
from safetensors import SafetensorError
from torch import Tensor, nn

from edje.files import draft_directory, write_file

_TENSORS, _STATE, _BEST = "tensors.safetensors", "state.json", "best.safetensors"
_MODULE, _OPTIMIZER = "module.", "optimizer."
_NUM_KEPT = 2
_Number = Annotated[int, Field(ge=0)]


class StateError(RuntimeError):
    """The saved state belongs to another run; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ValidationHistory:
    """The best validation of a phase so far, and the number of validations since."""

    best: float | None = None
    num_since_best: _Number = 0

    def after(self, value: float) -> ValidationHistory:
        """The history with one more validation."""
        if self.best is None or value > self.best:
            return ValidationHistory(value)
        return ValidationHistory(self.best, self.num_since_best + 1)


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Digests of what a run reads besides its recipe. With other inputs, a resumed run would repeat and skip data."""

    data: str  # image ids and captions of the training split
    tower: str | None = None  # weights and preprocessing of a published tower


@dataclass(frozen=True, slots=True)
class RunPosition:
    """How far a run has come: steps done in this phase, and in total.

    A phase ends with its validation; after it, the position is step 0 of the next phase.
    """

    phase: _Number
    step: _Number
    total_step: _Number
    captions_per_step: _Number = 0  # on all devices together
    num_captions: _Number = 0  # usable captions of the phase
    num_lines: _Number = 0  # lines of metrics written
    validations: ValidationHistory = ValidationHistory()


@dataclass(frozen=True, slots=True)
class SavedState:
    """A complete saved state."""

    position: RunPosition
    inputs: RunInputs
    tensors: dict[str, Tensor]


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    position: RunPosition
    inputs: RunInputs
    recipe: str
    sha256: str


def save_state(
    folder: Path,
    position: RunPosition,
    inputs: RunInputs,
    recipe_digest: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    constant: tuple[str, ...] = (),
) -> None:
    """Write the state of this position, without tensors whose names start with one of `constant`.

    Removes states of later steps, which belong to an abandoned continuation.
    """
    tensors = _weights(module, constant)
    if optimizer is not None:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter, slots in optimizer.state.items():
            for slot, value in slots.items():
                tensors[f"{_OPTIMIZER}{slot}.{names[id(parameter)]}"] = torch.as_tensor(value)
    final = folder / f"{position.total_step:08d}"
    data = _serialised(tensors)
    digest = _digest(position, inputs, recipe_digest, data)
    envelope = _Envelope(position=position, inputs=inputs, recipe=recipe_digest, sha256=digest)
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
        if _digest(envelope.position, envelope.inputs, envelope.recipe, data) != envelope.sha256:
            damaged.append(f"{path} was changed or truncated and is skipped")
            continue
        if envelope.recipe != recipe_digest:
            raise StateError(
                f"{path} belongs to another recipe: use the recipe that the run began with, or another output folder"
            )
        return SavedState(envelope.position, envelope.inputs, safetensors.torch.load(data)), damaged
    return None, damaged


def check_inputs(saved: SavedState, inputs: RunInputs) -> None:
    """Raise `StateError` if the data or the tower is not the one that the run began with."""
    if saved.inputs.data != inputs.data:
        raise StateError(
            "the training data has changed since the run began (images, captions or their order): restore it, or use "
            "another output folder"
        )
    if saved.inputs.tower != inputs.tower:
        raise StateError(
            "the published tower has other weights or preprocessing than when the run began: restore its files, or use "
            "another output folder"
        )


def batches_per_step(saved: RunPosition, batch_size: int, accumulate: int, num_devices: int, num_captions: int) -> int:
    """The batches of a step on each device with which a phase continues from a saved position.

    A step must consume as many captions as before, whatever the number of devices, else captions would be repeated and
    skipped. Raises `StateError` if that is impossible, or if other captions are usable than before.
    """
    if not saved.step:
        return accumulate
    if saved.num_captions != num_captions:
        raise StateError(
            f"{saved.num_captions:,} captions were usable when the phase began, now {num_captions:,}: restore the "
            "images that can no longer be decoded, or use another output folder"
        )
    per_batch = batch_size * num_devices
    if saved.captions_per_step % per_batch:
        raise StateError(
            f"the run took steps of {saved.captions_per_step} captions, which {num_devices} devices with batches of "
            f"{batch_size} cannot take: continue with a number of devices that divides "
            f"{saved.captions_per_step // batch_size}"
        )
    return saved.captions_per_step // per_batch


def save_best(folder: Path, module: nn.Module, *, constant: tuple[str, ...] = ()) -> None:
    """Keep the weights of the best validation, without tensors whose names start with one of `constant`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / _BEST, _serialised(_weights(module, constant)))


def restore_best(folder: Path, module: nn.Module, *, constant: tuple[str, ...] = ()) -> None:
    """Load the weights of the best validation. Raises `StateError` if they are missing or do not fit."""
    try:
        tensors = safetensors.torch.load((folder / _BEST).read_bytes())
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"{folder / _BEST} cannot be read ({error}): start the phase again in another folder"
        ) from error
    _load_weights(tensors, module, constant)


def restore_module(state: SavedState, module: nn.Module, *, constant: tuple[str, ...] = ()) -> None:
    """Load the saved weights into the module; those that start with one of `constant` stay as they are.

    Raises `StateError` if they do not fit.
    """
    _load_weights(state.tensors, module, constant)


def _load_weights(tensors: dict[str, Tensor], module: nn.Module, constant: tuple[str, ...]) -> None:
    weights = {name.removeprefix(_MODULE): each for name, each in tensors.items() if name.startswith(_MODULE)}
    weights |= (
        {name: each for name, each in module.state_dict().items() if name.startswith(constant)} if constant else {}
    )
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
        if name.startswith(_OPTIMIZER):
            _, slot, parameter = name.split(".", 2)
            target = parameters[parameter]
            optimizer.state[target][slot] = tensor.to(target.device, copy=True)


def _weights(module: nn.Module, constant: tuple[str, ...]) -> dict[str, Tensor]:
    return {
        f"{_MODULE}{name}": tensor.detach()
        for name, tensor in module.state_dict().items()
        if not name.startswith(constant)
    }


def _serialised(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})


def _digest(position: RunPosition, inputs: RunInputs, recipe_digest: str, data: bytes) -> str:
    fields = json.dumps([asdict(position), asdict(inputs), recipe_digest], sort_keys=True)
    return hashlib.sha256(fields.encode() + b"\n" + data).hexdigest()

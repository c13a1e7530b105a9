"""A whole training run: from a recipe to a checkpoint, phase by phase, resumable after any step.

Combines the parts of training and saves the state; knows none of their decisions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from edje.checkpoint import CheckpointError, read_digest
from edje.data.dataset import Dataset
from edje.data.spec import open_dataset
from edje.files import write_file
from edje.first_stage.base import FOLDER, read_folder
from edje.progress import progress_bars
from edje.recipe import Phase, Recipe
from edje.training.batches.batch import BatchBuilder
from edje.training.dev_retrieval import DevRetrieval, dev_retrieval, fit_calibration, validate
from edje.training.devices import Devices, computes_bf16
from edje.training.interrupt import stop_requests
from edje.training.loop import train_steps
from edje.training.metrics_log import MetricsLog
from edje.training.phase_data import PhaseData
from edje.training.schedule import parameter_groups
from edje.training.state import (
    RunInputs,
    RunPosition,
    SavedState,
    batches_per_step,
    check_inputs,
    find_state,
    restore_best,
    restore_module,
    restore_optimizer,
    save_best,
    save_state,
)
from edje.training.training_model import TrainingModel


@dataclass(frozen=True, slots=True)
class RunFolders:
    """The folders of a run. `features` is shared by runs with the same tower and data."""

    out: Path
    features: Path

    @property
    def state(self) -> Path:
        """The resumable states."""
        return self.out / "state"

    @property
    def checkpoint(self) -> Path:
        """The final checkpoint."""
        return self.out / "checkpoint"

    def after(self, phase: Phase) -> Path:
        """The checkpoint of a phase's latest validation, which other runs can start from."""
        return self.out / "after" / phase.name

    def best(self, phase: Phase) -> Path:
        """The checkpoint of a phase's best validation, for a phase with several."""
        return self.out / "best" / phase.name


class Run:
    """One process of a run."""

    def __init__(
        self, recipe: Recipe, folders: RunFolders, devices: Devices, console: Console, save_every: int
    ) -> None:
        self.recipe = recipe
        self.folders = folders
        self.devices = devices
        self.console = console
        self.save_every = save_every
        train_data, self.dev_data = open_dataset(recipe.data, "train"), open_dataset(recipe.data, "dev")
        self._log(train_data.summary())
        self.trained = TrainingModel(recipe, train_data, devices)
        self.phase_data = PhaseData(recipe, train_data, self.trained, folders.features, devices, console, self._log)
        tower = None if recipe.tower is None else self.trained.extractor().digest
        self.inputs = RunInputs(data_digest(train_data), tower)

    def train(self, metrics: MetricsLog | None, saved: SavedState | None) -> Path:
        """Train the remaining steps and write the checkpoint. Returns its folder."""
        position = RunPosition(0, 0, 0)
        if saved is not None:
            check_inputs(saved, self.inputs)
            position = saved.position
            restore_module(saved, self.trained.module, constant=self.trained.constant)
        total_step = position.total_step - position.step
        # A skipped phase keeps its number, which seeds the random draws of the others.
        for number, phase in enumerate(self.recipe.phase):
            if number >= position.phase and phase.name not in self.recipe.skip:
                total_step = self._train(number, phase, total_step, metrics, saved if position.step else None)
                saved, position = None, replace(position, step=0)
        if self.devices.leads:
            if self.recipe.calibrate:
                self._calibrate()
            digest = self.trained.write_checkpoint(self.folders.checkpoint)
            self._log(f"{self.folders.checkpoint}: model {digest}")
        self.devices.wait()
        return self.folders.checkpoint

    def _train(
        self, number: int, phase: Phase, total_before: int, metrics: MetricsLog | None, saved: SavedState | None
    ) -> int:
        """Train one phase, from the saved state if it had begun. Returns the number of steps done in total."""
        position = RunPosition(number, 0, total_before) if saved is None else saved.position
        if phase.precision == "bf16" and not computes_bf16(self.devices.device):
            self._log(f"{phase.name}: {self.devices.device} has no fast bf16; float32 is used instead")
        batches, position = self._batches(phase, position)
        order = batches.order
        num_steps = max(1, round(phase.epochs * order.steps_per_epoch))
        module = self.trained.module
        is_stopped = self.devices.any(_lacks_progress(phase, position))
        optimizer = self._optimizer(phase)
        if saved is not None:
            restore_optimizer(saved, module, optimizer)
        self.trained.set_phase(phase)
        with progress_bars(self.console, enabled=self.devices.leads) as progress, stop_requests() as stop:
            bar = progress.add_task(f"{self.recipe.name}, {phase.name}", total=num_steps, completed=position.step)
            for done in train_steps(
                module,
                optimizer,
                phase,
                number,
                seed=self.recipe.seed,
                steps=() if is_stopped else range(position.step, num_steps),
                num_steps=num_steps,
                steps_per_epoch=order.steps_per_epoch,
                accumulate=order.batches_per_step,
                batch_of=batches,
                devices=self.devices,
            ):
                step = done.number + 1
                position = replace(position, step=step, total_step=total_before + step)
                progress.update(bar, completed=step)
                if metrics is not None and done.is_logged:
                    metrics.write(position.total_step - 1, phase.name, done.metrics())
                if step < num_steps and phase.validate_every is not None and step % phase.validate_every == 0:
                    position = self._validate(phase, position, metrics)
                    module.train()
                    is_stopped = self.devices.any(_lacks_progress(phase, position))
                is_interrupted = self.devices.any(stop.requested)
                if step % self.save_every == 0 or step == num_steps or is_interrupted or is_stopped:
                    done.check()
                    self._save(position, metrics, optimizer)
                if is_interrupted:
                    raise KeyboardInterrupt
                if is_stopped:
                    break
        if is_stopped:
            self._log(
                f"{phase.name}: no better validation in {phase.patience} attempts; stopped after step {position.step}"
            )
        else:
            position = self._validate(phase, position, metrics)
        self._keep_best(phase, position)
        # Every phase begins with a new optimizer.
        self._save(RunPosition(number + 1, 0, position.total_step), metrics, None)
        self.devices.wait()
        return position.total_step

    def _batches(self, phase: Phase, position: RunPosition) -> tuple[BatchBuilder, RunPosition]:
        """The batches of a phase, with as many captions per step as at the saved position."""
        is_fresh = position.step == 0
        num_devices = self.devices.num_devices
        inputs = self.phase_data.inputs(position.phase, phase, is_fresh=is_fresh)
        accumulate = batches_per_step(position, phase.batch_size, phase.accumulate, num_devices, len(inputs.captions))
        if accumulate != phase.accumulate:
            self._log(
                f"{phase.name}: {num_devices} devices now take {accumulate} batches per step instead of "
                f"{phase.accumulate}, so that a step has {position.captions_per_step} captions as before"
            )
        batches = self.phase_data.batches(position.phase, phase, inputs, accumulate)
        captions_per_step = batches.order.captions_per_step
        return batches, replace(position, captions_per_step=captions_per_step, num_captions=len(inputs.captions))

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameter_groups(self.trained.module, phase), lr=phase.learning_rate, betas=(0.9, 0.98), fused=True
        )

    def _validate(self, phase: Phase, position: RunPosition, metrics: MetricsLog | None) -> RunPosition:
        """Validate, and write the phase's checkpoints. Returns the position with the result, on the leading process."""
        if not self.devices.leads:
            return position
        values = validate(self._dev_retrieval())
        self._log(f"{phase.name}, step {position.step}: {_listed(values)}")
        if metrics is not None:
            metrics.write(position.total_step - 1, phase.name, values)
        self.trained.write_checkpoint(self.folders.after(phase))
        history = position.validations.after(values[_validation_metric(phase)])
        if phase.validate_every is not None and history.num_since_best == 0:
            self.trained.write_checkpoint(self.folders.best(phase))
            save_best(self.folders.state, self.trained.module, constant=self.trained.constant)
        return replace(position, validations=history)

    def _keep_best(self, phase: Phase, position: RunPosition) -> None:
        """Return to the weights of the best validation, where the phase keeps them."""
        self.devices.wait()  # until the leading process has written them
        if phase.keep == "best" and self.devices.any(position.validations.num_since_best > 0):
            restore_best(self.folders.state, self.trained.module, constant=self.trained.constant)
            if self.devices.leads:
                self._log(
                    f"{phase.name}: the weights of the best validation ({position.validations.best:.3f}) are kept"
                )
                self.trained.write_checkpoint(self.folders.after(phase))

    def _dev_retrieval(self) -> DevRetrieval:
        return dev_retrieval(
            self.trained.model.eval(),
            self.trained.first_stage,
            self.dev_data,
            self.trained.tokenizer,
            self.phase_data.features_of(self.dev_data),
            k=self.recipe.k,
            num_captions=self.recipe.dev_captions,
            device=self.devices.device,
        )

    def _calibrate(self) -> None:
        """Fit the calibration on the dev split and make it part of the configuration."""
        calibration = fit_calibration(self._dev_retrieval())
        self.trained.config = replace(self.trained.config, calibration=calibration)
        for direction, constants in calibration.by_direction():
            self._log(f"calibrated {direction}: {constants.summary()}")

    def _save(self, position: RunPosition, metrics: MetricsLog | None, optimizer: torch.optim.Optimizer | None) -> None:
        if self.devices.leads:
            num_lines = 0 if metrics is None else metrics.num_lines
            save_state(
                self.folders.state,
                replace(position, num_lines=num_lines),
                self.inputs,
                recipe_digest(self.recipe),
                self.trained.module,
                optimizer,
                constant=self.trained.constant,
            )

    def _log(self, text: str) -> None:
        if self.devices.leads:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def recipe_digest(recipe: Recipe) -> str:
    """Identifies a recipe, so that a run does not resume from the state of another one."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def start_run(recipe: Recipe, folders: RunFolders, devices: Devices, console: Console, save_every: int) -> Path:
    """Train, from the latest complete state if there is one. Returns the checkpoint's folder."""
    saved, damaged = find_state(folders.state, recipe_digest(recipe))
    if devices.leads:
        for sentence in damaged:
            console.print(sentence, style="yellow", markup=False, soft_wrap=True)
    is_trained = saved is not None and {phase.name for phase in recipe.phase[saved.position.phase :]} <= set(
        recipe.skip
    )
    if is_trained and _is_complete(folders.checkpoint):
        if devices.leads:
            console.print("Nothing is left to train: the checkpoint is complete.", markup=False)
        return folders.checkpoint
    run = Run(recipe, folders, devices, console, save_every)
    if not devices.leads:
        return run.train(None, saved)
    folders.out.mkdir(parents=True, exist_ok=True)
    write_file(folders.out / "recipe.json", recipe.model_dump_json(indent=2) + "\n")
    position = RunPosition(0, 0, 0) if saved is None else saved.position
    with MetricsLog(folders.out, resume_step=position.total_step, num_lines=position.num_lines) as metrics:
        return run.train(metrics, saved)


def data_digest(data: Dataset) -> str:
    """Identifies image ids, captions and judged pairs in their order, which decide what every step reads."""
    digest = hashlib.sha256()
    for image in data.images:
        digest.update("\0".join((image.image_id, *image.captions, "")).encode(errors="surrogatepass"))
    for pair in data.judged:
        digest.update(f"{pair.image_id}\0{pair.text}\0{pair.score}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:16]


def _validation_metric(phase: Phase) -> str:
    """The recall that the phase improves."""
    return "first_stage_r1" if phase.losses.keys() <= {"first_stage", "regions"} else "reranked_r1"


def _lacks_progress(phase: Phase, position: RunPosition) -> bool:
    return phase.patience is not None and position.validations.num_since_best >= phase.patience


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_digest(checkpoint)
        read_folder(checkpoint / FOLDER)
    except CheckpointError:
        return False
    return True

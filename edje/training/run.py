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
from edje.data.spec import open_dataset
from edje.files import write_file
from edje.first_stage.base import FOLDER, read_folder
from edje.progress import progress_bars
from edje.recipe import Phase, Recipe
from edje.training.dev_retrieval import DevRetrieval, dev_retrieval, fit_calibration, validate
from edje.training.devices import Devices, computes_bf16
from edje.training.interrupt import stop_requests
from edje.training.loop import train_phase
from edje.training.metrics_log import MetricsLog
from edje.training.phase_data import PhaseData
from edje.training.schedule import parameter_groups
from edje.training.state import RunPosition, SavedState, find_state, restore_module, restore_optimizer, save_state
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
        """The checkpoint after a phase, which other runs can start from."""
        return self.out / "after" / phase.name


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

    def train(self, metrics: MetricsLog | None, saved: SavedState | None) -> Path:
        """Train the remaining steps and write the checkpoint. Returns its folder."""
        position = RunPosition(0, 0, 0)
        if saved is not None:
            position = saved.position
            restore_module(saved, self.trained.module)
            if position.score_statistics is not None:
                self.trained.standardise(*position.score_statistics)
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
        start = 0 if saved is None else saved.position.step
        if phase.precision == "bf16" and not computes_bf16(self.devices.device):
            self._log(f"{phase.name}: {self.devices.device} has no fast bf16; float32 is used instead")
        batches = self.phase_data.batches(number, phase, is_fresh=start == 0)
        steps_per_epoch = max(1, batches.order.steps_per_epoch // phase.accumulate)
        num_steps = max(1, round(phase.epochs * steps_per_epoch))
        module = self.trained.module
        optimizer = torch.optim.AdamW(
            parameter_groups(module, phase), lr=phase.learning_rate, betas=(0.9, 0.98), foreach=False
        )
        if saved is not None:
            restore_optimizer(saved, module, optimizer)
        self.trained.set_phase(phase)
        with progress_bars(self.console, enabled=self.devices.leads) as progress, stop_requests() as stop:
            bar = progress.add_task(f"{self.recipe.name}, {phase.name}", total=num_steps, completed=start)

            def on_step(step: int, values: dict[str, float] | None) -> None:
                done = step + 1
                progress.update(bar, completed=done)
                if metrics is not None and values is not None:
                    metrics.write(total_before + step, phase.name, values)
                stops = self.devices.any(stop.requested)
                if done % self.save_every == 0 or done == num_steps or stops:
                    self._save(RunPosition(number, done, total_before + done), metrics, optimizer)
                if stops:
                    raise KeyboardInterrupt

            train_phase(
                module,
                optimizer,
                phase,
                number,
                seed=self.recipe.seed,
                steps=range(start, num_steps),
                num_steps=num_steps,
                steps_per_epoch=steps_per_epoch,
                batch_of=batches,
                devices=self.devices,
                on_step=on_step,
            )
        total_step = total_before + num_steps
        if self.devices.leads:
            values = validate(self._dev_retrieval())
            self._log(f"{phase.name}: {_listed(values)}")
            if metrics is not None:
                metrics.write(total_step - 1, phase.name, values)
            self.trained.write_checkpoint(self.folders.after(phase))
        # Every phase begins with a new optimizer.
        self._save(RunPosition(number + 1, 0, total_step), metrics, None)
        self.devices.wait()
        return total_step

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
            position = replace(position, num_lines=num_lines, score_statistics=self.trained.score_statistics)
            save_state(self.folders.state, position, recipe_digest(self.recipe), self.trained.module, optimizer)

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


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_digest(checkpoint)
        read_folder(checkpoint / FOLDER)
    except CheckpointError:
        return False
    return True

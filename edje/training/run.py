"""A whole training run: from a recipe to a checkpoint, phase by phase, resumable after any step.

Puts the parts together and saves; each part's decisions are in its own module.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from edje.checkpoint import CheckpointError, read_digest
from edje.data.spec import open_dataset
from edje.first_stage.dual_encoder import FOLDER, read_folder
from edje.progress import progress_bars
from edje.recipe import Phase, Recipe
from edje.training.batches.phase_data import Lessons
from edje.training.calibrate import best_gain, candidates_of
from edje.training.dev_retrieval import DevSearch, dev_search
from edje.training.devices import Devices, computes_bf16
from edje.training.interrupt import stop_requests
from edje.training.journal import Journal
from edje.training.learner import Learner
from edje.training.loop import train_phase
from edje.training.schedule import parameter_groups
from edje.training.state import Place, SavedState, find_state, restore_module, restore_optimizer, save_state
from edje.training.validate import validate


@dataclass(frozen=True, slots=True)
class Places:
    """Folders of a run."""

    out: Path
    features: Path  # shared by runs with the same tower and data

    @property
    def state(self) -> Path:
        return self.out / "state"

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    def after(self, phase: Phase) -> Path:
        """A checkpoint of how far a phase came, to start other runs from."""
        return self.out / "after" / phase.name


class Run:
    """One process of a run."""

    def __init__(self, recipe: Recipe, places: Places, devices: Devices, console: Console, save_every: int) -> None:
        self.recipe = recipe
        self.places = places
        self.devices = devices
        self.console = console
        self.save_every = save_every
        train_data, self.dev_data = open_dataset(recipe.data, "train"), open_dataset(recipe.data, "dev")
        self._say(train_data.summary())
        self.learner = Learner(recipe, train_data, devices)
        self.lessons = Lessons(recipe, train_data, self.learner, places.features, devices, console, self._say)

    def go(self, journal: Journal | None, saved: SavedState | None) -> Path:
        """Train what is not trained yet, and write the checkpoint. Returns its folder."""
        place = Place(0, 0, 0)
        if saved is not None:
            place = saved.place
            restore_module(saved, self.learner.module)
            if place.score_spread is not None:
                self.learner.standardise(*place.score_spread)
        total_step = place.total_step - place.step
        # Phases keep their numbers where others are skipped, and with them what is drawn at random.
        for number, phase in enumerate(self.recipe.phase):
            if number >= place.phase and phase.name not in self.recipe.skip:
                total_step = self._train(number, phase, total_step, journal, saved if place.step else None)
                saved, place = None, replace(place, step=0)
        if self.devices.leads:
            if self.recipe.calibrate:
                self._calibrate()
            digest = self.learner.write(self.places.checkpoint)
            self._say(f"{self.places.checkpoint}: model {digest}")
        self.devices.wait()
        return self.places.checkpoint

    def _train(
        self, number: int, phase: Phase, total_before: int, journal: Journal | None, saved: SavedState | None
    ) -> int:
        """Train one phase, from the saved state where it has begun already. Returns how many steps are done then."""
        start = 0 if saved is None else saved.place.step
        if phase.precision == "bf16" and not computes_bf16(self.devices.device):
            self._say(f"{phase.name}: {self.devices.device} has no fast bf16, so float32 is used instead")
        batches = self.lessons.of_phase(number, phase, is_fresh=start == 0)
        steps_per_epoch = max(1, batches.order.steps_per_epoch // phase.accumulate)
        num_steps = max(1, round(phase.epochs * steps_per_epoch))
        module = self.learner.module
        optimizer = torch.optim.AdamW(
            parameter_groups(module, phase), lr=phase.learning_rate, betas=(0.9, 0.98), foreach=False
        )
        if saved is not None:
            restore_optimizer(saved, module, optimizer)
        self.learner.begin(phase)
        with progress_bars(self.console, enabled=self.devices.leads) as progress, stop_requests() as stop:
            bar = progress.add_task(f"{self.recipe.name}, {phase.name}", total=num_steps, completed=start)

            def on_step(step: int, values: dict[str, float] | None) -> None:
                done = step + 1
                progress.update(bar, completed=done)
                if journal is not None and values is not None:
                    journal.say(total_before + step, phase.name, values)
                stops = self.devices.any(stop.asked)
                if done % self.save_every == 0 or done == num_steps or stops:
                    self._save(Place(number, done, total_before + done), journal, optimizer)
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
            told = validate(self._dev_search())
            self._say(f"{phase.name}: " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()))
            if journal is not None:
                journal.say(total_step - 1, phase.name, told)
            self.learner.write(self.places.after(phase))
        # A phase begins without moments.
        self._save(Place(number + 1, 0, total_step), journal, None)
        self.devices.wait()
        return total_step

    def _dev_search(self) -> DevSearch:
        return dev_search(
            self.learner.model.eval(),
            self.learner.first_stage,
            self.dev_data,
            self.learner.tokenizer,
            self.lessons.features_of(self.dev_data),
            k=self.recipe.k,
            num_captions=self.recipe.dev_captions,
            device=self.devices.device,
        )

    def _calibrate(self) -> None:
        """Have the dev split say how much the first stage's score counts."""
        search = self._dev_search()
        scores = np.take_along_axis(search.similarity, candidates_of(search), axis=1)
        spread = float(scores.mean()), max(float(scores.std()), 1e-6)
        self.learner.standardise(*spread)
        gain = best_gain(search, self.learner.gain, *spread)
        self.learner.gain = gain
        told = validate(search)
        self._say(f"calibrated, gain {gain:.2f}: " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()))

    def _save(self, place: Place, journal: Journal | None, optimizer: torch.optim.Optimizer | None) -> None:
        if self.devices.leads:
            num_lines = 0 if journal is None else journal.num_lines
            place = replace(place, num_lines=num_lines, score_spread=self.learner.score_spread)
            save_state(self.places.state, place, recipe_digest(self.recipe), self.learner.module, optimizer)

    def _say(self, text: str) -> None:
        if self.devices.leads:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def recipe_digest(recipe: Recipe) -> str:
    """Identifies a recipe: state of one is no state of another."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def start_run(recipe: Recipe, places: Places, devices: Devices, console: Console, save_every: int) -> Path:
    """Train, from the last whole state where there is one. Returns the checkpoint's folder."""
    saved, passed_over = find_state(places.state, recipe_digest(recipe))
    if devices.leads:
        for sentence in passed_over:
            console.print(sentence, style="yellow", markup=False, soft_wrap=True)
    is_trained = saved is not None and {phase.name for phase in recipe.phase[saved.place.phase :]} <= set(recipe.skip)
    if is_trained and _is_whole(places.checkpoint):
        if devices.leads:
            console.print("Nothing is left to train: the checkpoint is complete.", markup=False)
        return places.checkpoint
    run = Run(recipe, places, devices, console, save_every)
    if not devices.leads:
        return run.go(None, saved)
    places.out.mkdir(parents=True, exist_ok=True)
    (places.out / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    place = Place(0, 0, 0) if saved is None else saved.place
    with Journal(places.out, resume_step=place.total_step, num_lines=place.num_lines) as journal:
        return run.go(journal, saved)


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_digest(checkpoint)
        read_folder(checkpoint / FOLDER)
    except CheckpointError:
        return False
    return True

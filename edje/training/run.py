"""A whole training run: from a recipe to a checkpoint, phase by phase, resumable after any step.

Puts the parts together; each part's decisions are in its own module.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edje.config import FirstStageConfig
from edje.data.dataset import Dataset
from edje.data.spec import open_dataset
from edje.data.views import view_of
from edje.feature_files import Features
from edje.features import extract, extractor_of
from edje.first_stage import FirstStageModel, FirstStageModelConfig, draw_first_stage, save_first_stage
from edje.model import Edje
from edje.recipe import Phase, Recipe, RecipeError
from edje.text import Tokenizer
from edje.training.build import Built, build_from, centre_inputs
from edje.training.corpus import Captions, FeatureViews, PixelRows, read_captions
from edje.training.devices import Devices
from edje.training.journal import Journal
from edje.training.loop import train_phase
from edje.training.pairs import FirstStageViews, best_mistakes, cross_fit, embed
from edje.training.sampling import Epochs, Miner, Plan, batch_miner, corpus_miner, plan_step
from edje.training.schedule import parameter_groups
from edje.training.state import Place, SavedState, find_state, restore_module, restore_optimizer, save_state
from edje.training.step import Batch, TrainingHeads, TrainingStep
from edje.training.text_states import TextStates, text_states
from edje.training.validate import validate
from edje.weights import load_checkpoint, save_checkpoint

CHECKPOINT = "checkpoint"
#: Images from which the mean and deviation of patches are taken.
_STATISTICS_IMAGES = 1000


@dataclass(frozen=True, slots=True)
class Places:
    """Folders of a run."""

    out: Path
    features: Path  # shared by runs with the same tower and data

    @property
    def state(self) -> Path:
        return self.out / "state"


class Run:
    """One process of a run."""

    def __init__(self, recipe: Recipe, places: Places, devices: Devices, console: Console, save_every: int) -> None:
        self.recipe = recipe
        self.places = places
        self.devices = devices
        self.console = console
        self.save_every = save_every
        self.train_data = open_dataset(recipe.data, "train")
        self.dev_data = open_dataset(recipe.data, "dev")
        self._say(self.train_data.summary())
        self.built: Built = build_from(recipe, (each for image in self.train_data.images for each in image.captions))
        self.tokenizer = Tokenizer(self.built.tokenizer_json, self.built.config)
        self.model: Edje = self.built.model.to(devices.device)
        self.first_stage = self._new_first_stage()
        first_stage_dim = recipe.first_stage.dim
        heads = TrainingHeads(self.built.config.joint, first_stage_dim)
        special = tuple(self.tokenizer.id_of(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
        self.module = TrainingStep(self.model, self.first_stage, heads, special).to(devices.device)  # type: ignore[arg-type]
        self.config = self.built.config
        self._views: FirstStageViews | None = None
        self._features: list[Features] = []

    def go(self, journal: Journal | None, saved: SavedState | None) -> Path:
        """Train what is not trained yet, and write the checkpoint. Returns its folder."""
        place = Place(0, 0, 0) if saved is None else saved.place
        if saved is not None:
            restore_module(saved, self.module)
        total_step = place.total_step
        for number, phase in enumerate(self.recipe.phase):
            if number < place.phase:
                continue
            start = place.step if number == place.phase else 0
            total_step = self._phase(number, phase, start, total_step, journal, saved if start else None)
            saved = None
        return self._finish()

    def _phase(
        self, number: int, phase: Phase, start: int, total_step: int, journal: Journal | None, saved: SavedState | None
    ) -> int:
        trains_tower = "vision" in phase.train
        captions = self._prepare(phase, is_start=number == 0 and start == 0, trains_tower=trains_tower)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.module, phase), lr=phase.learning_rate, betas=(0.9, 0.98), foreach=False
        )
        if saved is not None:
            restore_optimizer(saved, self.module, optimizer)
        self.module.begin(phase, self._teacher(phase))
        epochs = Epochs(len(captions), phase.batch_size * self.devices.num_devices, self.recipe.seed + number)
        steps_per_epoch = max(1, epochs.steps_per_epoch // phase.accumulate)
        num_steps = max(1, round(phase.epochs * steps_per_epoch))
        batch_of = self._batches(phase, captions, epochs, trains_tower)
        digest = recipe_digest(self.recipe)
        with self._progress() as progress:
            bar = progress.add_task(f"{self.recipe.name}, {phase.name}", total=num_steps, completed=start)

            def on_step(step: int, values: dict[str, float] | None) -> None:
                done = step + 1
                progress.update(bar, completed=done)
                if journal is not None and values is not None:
                    journal.say(total_step + done - start - 1, phase.name, values)
                if self.devices.leads and (done % self.save_every == 0 or done == num_steps):
                    # The last step of a phase is the start of the next one.
                    at = Place(number, done, total_step + done - start)
                    if done == num_steps:
                        at = replace(at, phase=number + 1, step=0)
                    kept = None if done == num_steps else optimizer
                    save_state(self.places.state, at, digest, self.module, kept)

            train_phase(
                self.module,
                optimizer,
                phase,
                number,
                seed=self.recipe.seed,
                steps=range(start, num_steps),
                num_steps=num_steps,
                steps_per_epoch=steps_per_epoch,
                batch_of=batch_of,
                devices=self.devices,
                on_step=on_step,
            )
        total_step += num_steps - start
        if self.devices.leads:
            told = validate(
                self.model.eval(),
                self.first_stage,
                self.dev_data,
                self.tokenizer,
                self._extract(self.dev_data),
                k=self.recipe.k,
                num_captions=self.recipe.dev_captions,
                device=self.devices.device,
            )
            self._say(f"{phase.name}: " + ", ".join(f"{name} {value:.3f}" for name, value in told.items()))
            if journal is not None:
                journal.say(total_step - 1, phase.name, told)
        self.devices.wait()
        return total_step

    def _prepare(self, phase: Phase, *, is_start: bool, trains_tower: bool) -> Captions:
        """The captions a phase shows; features and the first stage's views where the phase needs them."""
        if trains_tower:
            return read_captions(self.train_data, self.tokenizer, np.arange(len(self.train_data.images)))
        self._features = [
            self._extract(view_of(self.train_data, view, may_mirror=phase.mirror))
            for view in range(phase.crop_views + 1)
        ]
        captions = read_captions(self.train_data, self.tokenizer, self._features[0].rows)
        if is_start:
            some = self._features[0].tokens[self._features[0].rows[:_STATISTICS_IMAGES]].astype(np.float32)
            mean, std = some.mean(axis=(0, 1)), some.std(axis=(0, 1)) + 1e-3
            centre_inputs(self.model.adapter, torch.from_numpy(mean), torch.from_numpy(std))
        if self._views is None and self.recipe.first_stage.kind == "cca":
            fitted, self._views = cross_fit(
                self.recipe.first_stage,
                captions,
                self._features[0].pooled,
                self.config.joint.vocab_size,
                self.recipe.seed,
            )
            self.first_stage.load_state_dict(fitted.state_dict())
        elif "first_stage" not in phase.train:
            texts, images = embed(self.first_stage, captions, self._features[0].pooled)
            self._views = FirstStageViews(texts, images, np.zeros(len(images), np.int64))
        return captions

    def _batches(
        self, phase: Phase, captions: Captions, epochs: Epochs, trains_tower: bool
    ) -> Callable[[int, np.random.Generator], Batch]:
        """What a step works on, by its number."""
        scores_pairs = "itm" in phase.losses or "distillation" in phase.losses
        miner = self._miner(phase, captions) if scores_pairs else None
        preprocess = self.config.preprocess
        images = (
            PixelRows(self.train_data, preprocess.image_size, preprocess.resample)
            if trains_tower
            else FeatureViews([each.tokens for each in self._features])
        )
        num_views = phase.crop_views + 1
        states = self._text_states(phase, captions)

        def batch_of(number: int, rng: np.random.Generator) -> Batch:
            plan = plan_step(
                epochs.batch(number),
                captions.images,
                captions.keys,
                self.devices.rank,
                self.devices.num_devices,
                miner,
                phase.negatives.per_sample if miner else 0,
                rng,
            )
            seen = images.rows(plan.images, rng.integers(0, num_views, len(plan.images)))
            return self._batch(plan, captions, seen, states)

        return batch_of

    def _batch(self, plan: Plan, captions: Captions, images: torch.Tensor, states: TextStates | None) -> Batch:
        device = self.devices.device
        ids, lengths = captions.padded(plan.captions)
        scores = np.full(len(plan.pair_caption), np.nan, np.float32)
        texts = None
        if self._views is not None:
            exists = plan.pair_caption >= 0
            pairs = plan.captions[plan.pair_caption[exists]], plan.images[plan.pair_image[exists]]
            scores[exists] = self._views.of_pairs(*pairs)
            texts = torch.from_numpy(self._views.texts[plan.captions[plan.own_caption]]).to(device)
        numbers = (plan.own_caption, plan.own_image, plan.pair_caption, plan.pair_image)
        own_caption, own_image, pair_caption, pair_image = (torch.from_numpy(each).to(device) for each in numbers)
        return Batch(
            text_ids=ids.to(device),
            text_lengths=lengths.to(device),
            text_states=None if states is None else states.padded(plan.captions).to(device),
            images=images.to(device),
            own_caption=own_caption,
            own_image=own_image,
            pair_caption=pair_caption,
            pair_image=pair_image,
            pair_score=torch.from_numpy(scores).to(device),
            positive=torch.from_numpy(plan.positive).to(device),
            first_stage_texts=texts,
            num_negatives=plan.num_negatives,
        )

    def _miner(self, phase: Phase, captions: Captions) -> Miner:
        views, wanted = self._views, phase.negatives
        if views is None:
            raise RecipeError(
                f"phase {phase.name!r} mines negatives by a first stage that is still being trained: take "
                "'first_stage' out of its `train`, or 'itm' and 'distillation' out of its losses"
            )
        top_k = wanted.top_k or wanted.per_sample
        if wanted.source == "corpus":
            best = best_mistakes(views, captions, top_k)
            self._standardise(views, captions, best[0])
            return corpus_miner(*best, wanted.per_sample)
        best = best_mistakes(views, captions, max(top_k, self.recipe.k))
        self._standardise(views, captions, best[0])
        return batch_miner(views.similarity, captions.images, captions.keys, wanted.per_sample, top_k)

    def _standardise(self, views: FirstStageViews, captions: Captions, best_images: np.ndarray) -> None:
        """Tell the head how the first stage's scores are spread over its own best candidates."""
        head = self.model.joint.score_input
        if head is None:
            return
        rows = np.repeat(np.arange(len(captions)), best_images.shape[1])
        images = best_images.reshape(-1)
        scores = np.concatenate(
            (
                views.of_pairs(rows[images >= 0], images[images >= 0]),
                views.of_pairs(np.arange(len(captions)), captions.images),
            )
        )
        head.mean, head.std = float(scores.mean()), float(scores.std())
        joint = replace(
            self.config.joint,
            first_stage=FirstStageConfig(mean=head.mean, std=head.std, hidden_dim=head.fc1.out_features),
        )
        self.config = replace(self.config, joint=joint)

    def _text_states(self, phase: Phase, captions: Captions) -> TextStates | None:
        if not self.config.joint.text_layers or "text" in phase.train or phase.word_dropout:
            return None
        return text_states(
            self.model, captions, self.places.features, self.devices.device, shows_progress=self.devices.leads
        )

    def _teacher(self, phase: Phase) -> Edje | None:
        if phase.teacher is None:
            return None
        teacher = load_checkpoint(Path(phase.teacher))
        if extractor_of(teacher.model, teacher.config).digest != extractor_of(self.model, self.config).digest:
            raise RecipeError(
                f"the teacher {phase.teacher} looks through another tower: distil from one that shares it"
            )
        return teacher.model.to(self.devices.device)

    def _new_first_stage(self) -> FirstStageModel:
        recipe, config = self.recipe.first_stage, self.built.config
        is_trained = recipe.kind == "dual"
        model = FirstStageModel(
            FirstStageModelConfig(
                dim=recipe.dim,
                vocab_size=config.joint.vocab_size,
                image_dim=config.vision.pooled_dim,
                text_dim=recipe.text_dim if is_trained else recipe.dim,
                num_layers=recipe.num_layers if is_trained else 0,
                num_heads=recipe.num_heads if is_trained else 1,
                max_positions=config.preprocess.max_text_tokens,
                image_power=1.0 if is_trained else recipe.image_power,
            )
        )
        draw_first_stage(model, self.recipe.seed)
        return model

    def _extract(self, dataset: Dataset) -> Features:
        console = self.console if self.devices.leads else Console(quiet=True)
        return extract(extractor_of(self.model.eval(), self.config), dataset, self.places.features, console=console)

    def _finish(self) -> Path:
        checkpoint = self.places.out / CHECKPOINT
        if self.devices.leads:
            shutil.rmtree(checkpoint, ignore_errors=True)
            digest = save_checkpoint(checkpoint, self.config, self.model.eval(), self.built.tokenizer_json)
            save_first_stage(checkpoint, self.first_stage)
            self._say(f"{checkpoint}: model {digest}")
        self.devices.wait()
        return checkpoint

    def _say(self, text: str) -> None:
        if self.devices.leads:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.devices.leads,
        )


def recipe_digest(recipe: Recipe) -> str:
    """Identifies a recipe: state of one is no state of another."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def start_run(recipe: Recipe, places: Places, devices: Devices, console: Console, save_every: int) -> Path:
    """Train, from the last whole state where there is one. Returns the checkpoint's folder."""
    saved, passed_over = find_state(places.state, recipe_digest(recipe))
    for sentence in passed_over:
        console.print(sentence, style="yellow", markup=False, soft_wrap=True)
    run = Run(recipe, places, devices, console, save_every)
    if not devices.leads:
        return run.go(None, saved)
    places.out.mkdir(parents=True, exist_ok=True)
    (places.out / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    with Journal(places.out, resume_step=0 if saved is None else saved.place.total_step) as journal:
        return run.go(journal, saved)

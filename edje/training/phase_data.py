"""Builds a phase's batches from the dataset and the current model.

Images that cannot be decoded are counted, named once and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from edje.data.augmentation import view_of
from edje.data.dataset import Dataset, LabelledSource, Problems
from edje.data.spec import ScenesSpec
from edje.features.extraction import extract, pooled_only
from edje.features.storage import Features
from edje.recipe import PAIR_LOSSES, TEACHER_LOSSES, Phase, Recipe, RecipeError
from edje.training.batches.batch import BatchBuilder
from edje.training.batches.corpus import (
    Captions,
    FeatureImages,
    ImageSource,
    PixelImages,
    decodable_images,
    encode_captions,
)
from edje.training.batches.embeddings import FirstStageEmbeddings
from edje.training.batches.grounding import GroundingLabeller
from edje.training.batches.judged import JudgedPairs
from edje.training.batches.negatives import Ints, NegativeSampler, Positives
from edje.training.batches.plan import CaptionOrder
from edje.training.batches.text_states import TextStates, cached_text_states
from edje.training.build import normalise_inputs
from edje.training.devices import Devices
from edje.training.first_stage.candidates import embed_split, negative_sampler
from edje.training.first_stage.vector_cache import Half, cached_embeddings
from edje.training.training_model import TrainingModel

T = TypeVar("T")

#: Number of images that give the mean and deviation of patch tokens.
_STATISTICS_IMAGES = 1000
_STATISTICS_BATCH = 32


@dataclass(frozen=True, slots=True)
class PhaseInputs:
    """The captions and images from which a phase's batches are built."""

    captions: Captions
    images: ImageSource
    pooled: NDArray[np.floating] | None  # (N, E) of a frozen tower


class PhaseData:
    """Builds the batches of each phase, with the model as it is at the start of the phase."""

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        trained: TrainingModel,
        features: Path,
        devices: Devices,
        console: Console,
        log: Callable[[str], None],
    ) -> None:
        """`features` is the folder for stored features; `log` prints a sentence about images that are left out."""
        self._recipe = recipe
        self._data = data
        self._trained = trained
        self._folder = features
        self._devices = devices
        self._console = console
        self._log = log
        self._embeddings: FirstStageEmbeddings | None = None
        self._reported: set[str] = set()  # names of datasets whose undecodable images were reported

    def inputs(self, number: int, phase: Phase, *, is_fresh: bool) -> PhaseInputs:
        """Captions and images of a phase. `is_fresh` is true before the phase's first step. Raises `DataError`."""
        return PhaseInputs(*self._inputs(number, phase, is_fresh))

    def batches(self, number: int, phase: Phase, inputs: PhaseInputs, accumulate: int) -> BatchBuilder:
        """The batches of a phase, `accumulate` for each step. Raises `RecipeError`."""
        captions, images, pooled = inputs.captions, inputs.images, inputs.pooled
        num_devices = self._devices.num_devices
        captions_per_step = phase.batch_size * num_devices * accumulate
        if len(captions) < captions_per_step:
            raise RecipeError(
                f"phase {phase.name!r}: {len(captions)} captions do not fill a step of {captions_per_step} "
                f"({phase.batch_size} on each of {num_devices} devices, accumulate {accumulate}): set a smaller "
                "batch_size or accumulate"
            )
        self._embeddings = None if pooled is None else self._embed(phase, captions, pooled)
        positives = Positives(captions.keys, captions.images)
        judged = JudgedPairs(self._data, captions) if self._data.judged else None
        if TEACHER_LOSSES & phase.losses.keys() and phase.teacher is None and (judged is None or not judged.has_scores):
            raise RecipeError(
                f"phase {phase.name!r}: the loss {min(TEACHER_LOSSES & phase.losses.keys())!r} needs a teacher: set "
                "`teacher` to a checkpoint, or use data with scores (a column teacher_score, or lists with scores)"
            )
        sampler = self._sampler(phase, captions, positives, judged)
        return BatchBuilder(
            captions=captions,
            positives=positives,
            order=CaptionOrder(
                len(captions),
                captions_per_step,
                self._recipe.seed + number,
                captions.images,
                self._groups()[captions.images] if phase.groups_together else None,
                accumulate,
            ),
            images=images,
            embeddings=self._embeddings,
            text_states=self._text_states(phase, captions),
            sampler=sampler,
            judged=judged if judged is not None and judged.has_scores and phase.teacher is None else None,
            rank=self._devices.rank,
            num_devices=num_devices,
            device=self._devices.device,
            region_labels=self._labelled_source() if "regions" in phase.losses else None,
            grounding=(
                GroundingLabeller(self._labelled_source(), captions, self._trained.tokenizer)
                if "grounding" in phase.losses
                else None
            ),
        )

    def _sampler(
        self, phase: Phase, captions: Captions, positives: Positives, judged: JudgedPairs | None
    ) -> NegativeSampler | None:
        if not PAIR_LOSSES & phase.losses.keys():
            return None
        if phase.negatives.source == "lists":
            if judged is None:
                raise RecipeError(
                    f"phase {phase.name!r}: negatives.source = 'lists' needs data with candidate lists (data.kind = "
                    "'lists') or a column label"
                )
            return judged.sampler(positives, phase.negatives.per_sample)
        assert self._embeddings is not None  # the recipe ensures it
        return negative_sampler(phase.negatives, self._embeddings, captions, positives)

    def _labelled_source(self) -> LabelledSource:
        source = self._data.source
        assert isinstance(source, LabelledSource)  # the recipe ensures it
        return source

    def features_of(self, dataset: Dataset, *, is_shared: bool = False) -> Features:
        """The tower's features of a dataset. `is_shared` if every process calls this, each to extract its share."""
        features = self._extract(dataset, is_shared=is_shared)
        self._report(dataset, features)
        return features

    def _inputs(
        self, number: int, phase: Phase, is_fresh: bool
    ) -> tuple[Captions, ImageSource, NDArray[np.floating] | None]:
        """Captions and images of a phase, and the pooled embeddings where the tower is frozen."""
        trained, data = self._trained, self._data
        if "vision" in phase.train:
            preprocess = trained.config.preprocess
            usable = np.arange(len(data.images))
            if not isinstance(self._recipe.data, ScenesSpec):  # drawn images can always be decoded
                usable = decodable_images(data, preprocess.image_size, preprocess.resample)
                self._report(data)
            captions = encode_captions(data, trained.tokenizer, usable)
            return (
                captions,
                PixelImages(data, preprocess.image_size, preprocess.resample, self._report_unreadable),
                None,
            )
        if not self._recipe.keeps_patches:
            return self._pixel_inputs(number, is_fresh)
        features = [self.features_of(data, is_shared=True)]
        views = range(1, phase.crop_views + 1)
        features += [self._extract(view_of(data, view, may_mirror=phase.mirror)) for view in views]
        rows = features[0].rows
        if is_fresh and self._adapter_is_initial(number):
            self._normalise(features[0].tokens[rows[:_STATISTICS_IMAGES]])
        return encode_captions(data, trained.tokenizer, rows), FeatureImages(features), features[0].pooled

    def _pixel_inputs(self, number: int, is_fresh: bool) -> tuple[Captions, ImageSource, NDArray[np.floating]]:
        """The inputs where the frozen tower runs in every step and only pooled embeddings are stored."""
        trained, data = self._trained, self._data
        features = self._extract(data, keeps_patches=False)
        self._report(data, features)
        preprocess = trained.config.preprocess
        images = PixelImages(data, preprocess.image_size, preprocess.resample, self._report_unreadable)
        if is_fresh and self._adapter_is_initial(number):
            rows = features.rows[:_STATISTICS_IMAGES]
            self._normalise(np.concatenate([self._patch_tokens(images, some) for some in _chunks(rows)]))
        return encode_captions(data, trained.tokenizer, features.rows), images, features.pooled

    @torch.inference_mode()
    def _patch_tokens(self, images: PixelImages, rows: Ints) -> NDArray[np.float32]:
        """The tower's patch tokens of some images: (U, S, D)."""
        pixels, _ = images.batch(rows, rows)
        patches: NDArray[np.float32] = (
            self._trained.model.run_tower(pixels.to(self._devices.device))[0].float().cpu().numpy()
        )
        return patches

    def _normalise(self, patches: NDArray[np.floating]) -> None:
        """Adapt the adapter to the mean and deviation of patch tokens (N, S, D)."""
        some = torch.from_numpy(patches.astype(np.float32))
        mean, std = some.mean((0, 1)), some.std((0, 1), correction=0) + 1e-3
        normalise_inputs(self._trained.model.adapter, mean.to(self._devices.device), std.to(self._devices.device))

    def _adapter_is_initial(self, number: int) -> bool:
        """Whether the adapter has its initial weights and has not been adapted to features before this phase."""
        recipe = self._recipe
        begun = set() if recipe.start is None else set(recipe.start.parts)
        earlier = [phase for phase in recipe.phase[:number] if phase.name not in recipe.skip]
        begun = begun.union(*(phase.train for phase in earlier))
        return "adapter" not in begun and all("vision" in phase.train for phase in earlier)

    def _groups(self) -> Ints:
        """A group number for each image; an image without a group forms one alone."""
        names = [f"{n}" if image.group is None else f"group {image.group}" for n, image in enumerate(self._data.images)]
        return np.unique(names, return_inverse=True)[1]

    def _embed(self, phase: Phase, captions: Captions, pooled: NDArray[np.floating]) -> FirstStageEmbeddings | None:
        groups = [image.group for image in self._data.images]
        first_stage = self._trained.first_stage

        def from_disk() -> tuple[Half, Half]:
            return cached_embeddings(first_stage, captions, pooled, self._folder, shows_progress=self._devices.leads)

        cached = (lambda: self._once(from_disk)) if self._recipe.first_stage.kind == "hub" else None
        return embed_split(self._recipe, phase, first_stage, captions, pooled, groups, self._embeddings, cached)

    def _text_states(self, phase: Phase, captions: Captions) -> TextStates | None:
        if not self._trained.config.joint.text_layers or "text" in phase.train or phase.word_dropout:
            return None
        return self._once(
            lambda: cached_text_states(
                self._trained.model, captions, self._folder, self._devices.device, shows_progress=self._devices.leads
            )
        )

    def _once(self, load: Callable[[], T]) -> T:
        """Let the leading process compute and store something before the others load it."""
        if not self._devices.leads:
            self._devices.wait()
        loaded = load()
        if self._devices.leads:
            self._devices.wait()
        return loaded

    def _extract(self, dataset: Dataset, *, keeps_patches: bool = True, is_shared: bool = True) -> Features:
        trained = self._trained
        console = self._console if self._devices.leads else Console(quiet=True)
        # Views share their dataset's problems and every phase extracts; `_report` counts each image once.
        dataset = replace(dataset, problems=Problems())
        extractor = trained.extractor()
        if not keeps_patches:
            extractor = pooled_only(extractor)
        if not is_shared:
            return extract(extractor, dataset, self._folder, console=console)
        devices = self._devices
        return extract(
            extractor,
            dataset,
            self._folder,
            console=console,
            rank=devices.rank,
            num_processes=devices.num_devices,
            wait=devices.wait,
        )

    def _report_unreadable(self, image_id: str, cause: str) -> None:
        """Print, on whichever process it happens, that an image was lost during training."""
        text = f"{self._data.name}: {image_id} can no longer be read ({cause}); a grey image replaces it"
        self._console.print(text, style="yellow", markup=False, soft_wrap=True)

    def _report(self, dataset: Dataset, features: Features | None = None) -> None:
        """Log once which images of a dataset cannot be decoded."""
        if dataset.name in self._reported:
            return
        self._reported.add(dataset.name)
        for index in () if features is None else features.unreadable:
            dataset.problems.record("undecodable_image", dataset.images[index].image_id)
        if "undecodable_image" in dataset.problems.counts:
            self._log(f"{dataset.name}: {dataset.problems.report()}")


def _chunks(rows: Ints) -> list[Ints]:
    return [rows[start : start + _STATISTICS_BATCH] for start in range(0, len(rows), _STATISTICS_BATCH)]

"""What a phase is shown: captions, features of the images or their pixels, negatives, in the order of its batches.

Images that do not decode are counted, named once and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from edje.data.augmentation import view_of
from edje.data.dataset import Dataset, LabelledSource, Problems
from edje.data.spec import ScenesSpec
from edje.features.extraction import extract, extractor_of, without_patches
from edje.features.storage import Features
from edje.recipe import Phase, Recipe, RecipeError
from edje.training.batches.batch import Batches
from edje.training.batches.grounding import ClaimReader
from edje.training.batches.sampling import Epochs
from edje.training.batches.text_states import TextStates, text_states
from edje.training.build import centre_inputs
from edje.training.corpus import Captions, FeatureViews, ImageRows, Ints, PixelRows, decodable, read_captions
from edje.training.devices import Devices
from edje.training.first_stage.candidates import miner_for, views_for
from edje.training.first_stage.pairs import FirstStageViews
from edje.training.first_stage.vector_cache import Half, kept_vectors
from edje.training.learner import Learner
from edje.training.negatives import Truth

#: Images from which the mean and deviation of patches are taken.
_STATISTICS_IMAGES = 1000
_STATISTICS_BATCH = 32
_PAIR_LOSSES = {"itm", "distillation"}


class Lessons:
    """Makes the batches of each phase, after the learner as it is by then."""

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        learner: Learner,
        features: Path,
        devices: Devices,
        console: Console,
        say: Callable[[str], None],
    ) -> None:
        """`features` is the folder for what the tower sees; `say` hears of images that do not decode."""
        self._recipe = recipe
        self._data = data
        self._learner = learner
        self._folder = features
        self._devices = devices
        self._console = console
        self._say = say
        self._views: FirstStageViews | None = None
        self._told: set[str] = set()  # datasets whose images that do not decode were named

    def of_phase(self, number: int, phase: Phase, *, is_fresh: bool) -> Batches:
        """What a phase shows. `is_fresh` says that none of its steps is taken yet. Raises `RecipeError`."""
        captions, images, pooled = self._seen(number, phase, is_fresh)
        num_devices = self._devices.num_devices
        if len(captions) < phase.batch_size * num_devices:
            raise RecipeError(
                f"phase {phase.name!r}: {len(captions)} captions do not fill a batch of {phase.batch_size} on each of "
                f"{num_devices} devices: choose a smaller batch_size"
            )
        self._views = None if pooled is None else self._said(phase, captions, pooled)
        truth = Truth(captions.keys, captions.images)
        miner = None
        if _PAIR_LOSSES & phase.losses.keys():
            assert self._views is not None  # the recipe was checked
            miner, spread = miner_for(phase.negatives, self._views, captions, truth, self._recipe.k)
            if self._learner.reads_first_stage:
                self._learner.standardise(*spread())
        return Batches(
            captions=captions,
            truth=truth,
            order=Epochs(
                len(captions),
                phase.batch_size * num_devices,
                self._recipe.seed + number,
                captions.images,
                self._groups()[captions.images] if phase.groups_together else None,
            ),
            images=images,
            views=self._views,
            states=self._text_states(phase, captions),
            miner=miner,
            num_negatives=phase.negatives.per_sample,
            devices=self._devices,
            labels=self._source() if "regions" in phase.losses else None,
            claims=(
                ClaimReader(self._source(), captions, self._learner.tokenizer) if "grounding" in phase.losses else None
            ),
        )

    def _source(self) -> LabelledSource:
        source = self._data.source
        assert isinstance(source, LabelledSource)  # the recipe was checked
        return source

    def features_of(self, dataset: Dataset) -> Features:
        """What the tower sees in a dataset's images."""
        features = self._extract(dataset)
        self._tell(dataset, features)
        return features

    def _seen(
        self, number: int, phase: Phase, is_fresh: bool
    ) -> tuple[Captions, ImageRows, NDArray[np.floating] | None]:
        """Captions and images of a phase, and the pooled embeddings of a tower that is frozen by now."""
        learner, data = self._learner, self._data
        if "vision" in phase.train:
            preprocess = learner.config.preprocess
            usable = np.arange(len(data.images))
            if not isinstance(self._recipe.data, ScenesSpec):  # what is drawn does not have to be decoded
                usable = decodable(data, preprocess.image_size, preprocess.resample)
                self._tell(data)
            captions = read_captions(data, learner.tokenizer, usable)
            return captions, PixelRows(data, preprocess.image_size, preprocess.resample), None
        if not self._recipe.keeps_patches:
            return self._seen_live(number, is_fresh)
        features = [self.features_of(data)]
        views = range(1, phase.crop_views + 1)
        features += [self._extract(view_of(data, view, may_mirror=phase.mirror)) for view in views]
        rows = features[0].rows
        if is_fresh and self._adapter_is_drawn(number):
            self._centre(features[0].tokens[rows[:_STATISTICS_IMAGES]])
        return read_captions(data, learner.tokenizer, rows), FeatureViews(features), features[0].pooled

    def _seen_live(self, number: int, is_fresh: bool) -> tuple[Captions, ImageRows, NDArray[np.floating]]:
        """The same where the tower runs in every step: nothing is kept but what the first stage compares."""
        learner, data = self._learner, self._data
        features = self._extract(data, keeps_patches=False)
        self._tell(data, features)
        preprocess = learner.config.preprocess
        images = PixelRows(data, preprocess.image_size, preprocess.resample)
        if is_fresh and self._adapter_is_drawn(number):
            rows = features.rows[:_STATISTICS_IMAGES]
            self._centre(np.concatenate([self._look(images, some) for some in _parts(rows)]))
        return read_captions(data, learner.tokenizer, features.rows), images, features.pooled

    @torch.inference_mode()
    def _look(self, images: PixelRows, rows: Ints) -> NDArray[np.float32]:
        """What the tower sees in these images: (U, S, D)."""
        pixels, _ = images.rows(rows, rows)
        patches: NDArray[np.float32] = (
            self._learner.model.extract(pixels.to(self._devices.device))[0].float().cpu().numpy()
        )
        return patches

    def _centre(self, patches: NDArray[np.floating]) -> None:
        """Fit the adapter to the patches (N, S, D) of some images."""
        some = torch.from_numpy(patches.astype(np.float32))
        mean, std = some.mean((0, 1)), some.std((0, 1), correction=0) + 1e-3
        centre_inputs(self._learner.model.adapter, mean.to(self._devices.device), std.to(self._devices.device))

    def _adapter_is_drawn(self, number: int) -> bool:
        """Whether the adapter is still as it was drawn, and has met no features before this phase."""
        recipe = self._recipe
        begun = set() if recipe.start is None else set(recipe.start.parts)
        earlier = [phase for phase in recipe.phase[:number] if phase.name not in recipe.skip]
        begun = begun.union(*(phase.train for phase in earlier))
        return "adapter" not in begun and all("vision" in phase.train for phase in earlier)

    def _groups(self) -> Ints:
        """A number for each image's group; an image without a group is one of its own."""
        names = [f"{n}" if image.group is None else f"group {image.group}" for n, image in enumerate(self._data.images)]
        return np.unique(names, return_inverse=True)[1]

    def _said(self, phase: Phase, captions: Captions, pooled: NDArray[np.floating]) -> FirstStageViews | None:
        groups = [image.group for image in self._data.images]
        first_stage = self._learner.first_stage

        def published() -> tuple[Half, Half]:
            return kept_vectors(first_stage, captions, pooled, self._folder, shows_progress=self._devices.leads)

        kept = published if self._recipe.first_stage.kind == "hub" else None
        return views_for(self._recipe, phase, first_stage, captions, pooled, groups, self._views, kept)

    def _text_states(self, phase: Phase, captions: Captions) -> TextStates | None:
        if not self._learner.config.joint.text_layers or "text" in phase.train or phase.word_dropout:
            return None
        return text_states(
            self._learner.model, captions, self._folder, self._devices.device, shows_progress=self._devices.leads
        )

    def _extract(self, dataset: Dataset, *, keeps_patches: bool = True) -> Features:
        learner = self._learner
        console = self._console if self._devices.leads else Console(quiet=True)
        # Views share a dataset's problems, and each phase comes here again; an image is counted once, by `_tell`.
        dataset = replace(dataset, problems=Problems())
        extractor = extractor_of(learner.model.eval(), learner.config)
        if not keeps_patches:
            extractor = without_patches(extractor)
        return extract(extractor, dataset, self._folder, console=console)

    def _tell(self, dataset: Dataset, features: Features | None = None) -> None:
        """Say once which of a dataset's images do not decode."""
        if dataset.name in self._told:
            return
        self._told.add(dataset.name)
        for number in () if features is None else features.unreadable:
            dataset.problems.record("undecodable_image", dataset.images[number].image_id)
        if "undecodable_image" in dataset.problems.counts:
            self._say(f"{dataset.name}: {dataset.problems.report()}")


def _parts(rows: Ints) -> list[Ints]:
    return [rows[start : start + _STATISTICS_BATCH] for start in range(0, len(rows), _STATISTICS_BATCH)]

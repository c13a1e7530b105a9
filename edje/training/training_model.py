"""The model under training, with its tokenizer, its first stage and the training heads."""

from __future__ import annotations

from pathlib import Path

from edje.config import EdjeConfig
from edje.data.dataset import Dataset, LabelledSource
from edje.features.extraction import Extractor, extractor_of
from edje.files import draft_directory
from edje.first_stage.base import FirstStageEncoder, save_first_stage
from edje.first_stage.dual_encoder import DualEncoder
from edje.model.edje import Edje
from edje.model.initialisation import initialise
from edje.model.weights import save_checkpoint
from edje.recipe import Phase, Recipe
from edje.text import Tokenizer
from edje.training.build import build_model, load_start, load_teacher
from edje.training.devices import Devices
from edje.training.first_stage.candidates import create_first_stage
from edje.training.step import TrainingHeads, TrainingStep


class TrainingModel:
    """The parts of a recipe's model, on this process's device."""

    def __init__(self, recipe: Recipe, data: Dataset, devices: Devices) -> None:
        """The captions of `data` give the vocabulary if the recipe names none."""
        captions = (each for image in data.images for each in image.captions)
        built = build_model(recipe, captions)
        self._tokenizer_json = built.tokenizer_json
        self._device = devices.device
        self._has_published_tower = recipe.tower is not None
        self._extractor: Extractor | None = None
        self.config: EdjeConfig = built.config
        self.tokenizer = Tokenizer(built.tokenizer_json, built.config)
        self.model: Edje = built.model
        self.first_stage: FirstStageEncoder = create_first_stage(recipe, built.config, devices.device)
        source = data.source if isinstance(data.source, LabelledSource) else None
        heads = TrainingHeads(
            built.config.joint,
            self.first_stage.dim,
            built.config.vision.dim,
            source.label_sizes if source else (),
            source.num_regions if source else 0,
        )
        initialise(heads, recipe.seed)
        trained = self.first_stage if isinstance(self.first_stage, DualEncoder) else None
        cls_id, sep_id, mask_id = (self.tokenizer.token_id(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
        module = TrainingStep(self.model, trained, heads, (cls_id, sep_id, mask_id))
        if recipe.start is not None:
            load_start(module, recipe.start, built.tokenizer_json)
        self.module = module.to(devices.device)

    def set_phase(self, phase: Phase) -> None:
        """Let the module compute this phase's losses. Raises `RecipeError` for a teacher that does not fit."""
        teacher = None
        if phase.teacher is not None:
            teacher = load_teacher(Path(phase.teacher), self.config, self.model, self._tokenizer_json)
            teacher = teacher.to(self._device)
        self.module.set_phase(phase, teacher)

    @property
    def constant(self) -> tuple[str, ...]:
        """Prefixes of the module's tensors that never change and are not part of a saved state."""
        return ("model.vision.",) if self._has_published_tower else ()

    def extractor(self) -> Extractor:
        """The tower with its preprocessing, as it is now."""
        if self._extractor is None:
            extractor = extractor_of(self.model.eval(), self.config)
            if not self._has_published_tower:
                return extractor
            self._extractor = extractor  # computed once: it hashes all weights
        return self._extractor

    def write_checkpoint(self, checkpoint: Path) -> str:
        """Write a checkpoint, or replace it, atomically. Returns its digest."""
        with draft_directory(checkpoint) as draft:
            digest = save_checkpoint(draft, self.config, self.model.eval(), self._tokenizer_json)
            save_first_stage(draft, self.first_stage)
        return digest

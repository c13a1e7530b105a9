"""A recipe: everything a training run depends on, as one TOML file. Knows neither torch nor data.

Closed: a name nobody knows is an error. Relative paths are taken from the folder of the recipe.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from edje.config import AdapterConfig
from edje.data.spec import DataSpec
from edje.vision_config import VitConfig

Part = Literal["vision", "adapter", "text", "visual", "meeting", "first_stage"]
LossName = Literal["itm", "mlm", "text_recovery", "distillation", "late_interaction", "first_stage"]
Weight = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class RecipeError(ValueError):
    """The recipe cannot be followed; the message says where."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JointRecipe(_Closed):
    """The joint encoder; sizes that are left out come from the BERT it starts from."""

    kind: Literal["full", "late", "minimal", "maxsim"] = "full"
    dim: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    hidden_dim: PositiveInt | None = None
    num_layers: Annotated[int, Field(ge=0)] | None = None
    text_layers: Annotated[int, Field(ge=0)] = 0
    visual_layers: Annotated[int, Field(ge=0)] = 0
    match_dim: Annotated[int, Field(ge=0)] = 0
    reads_first_stage: bool = False
    bert: str | None = None  # a folder, package:NAME/folder or a name on the hub; None: from scratch
    bert_layers: tuple[int, ...] | None = None  # which of its layers the layers after the meeting start from
    bert_visual_layers: tuple[int, ...] | None = None


class FirstStageRecipe(_Closed):
    """`cca` is fitted before the first phase, cross-fitted in `folds`; `dual` is trained in phases that say so.

    `hub` is the pair of encoders that the tower belongs to (SigLIP, CLIP).
    """

    kind: Literal["cca", "dual", "hub"]
    dim: PositiveInt = 128
    folds: Annotated[int, Field(ge=2)] = 5
    ridge: PositiveFloat = 0.5
    correlation_power: Weight = 1.0
    image_power: PositiveFloat = 0.5
    text_dim: PositiveInt = 64
    num_layers: Annotated[int, Field(ge=0)] = 1
    num_heads: PositiveInt = 4
    source: str | None = None  # of kind hub


class Negatives(_Closed):
    """`per_sample` for each caption and each image, drawn from the `top_k` that the first stage ranks highest.

    From the `batch` (all devices' together, as in the paper), or from the `corpus`: what the first stage, cross-fitted,
    would hand over at test time.
    """

    source: Literal["batch", "corpus"] = "batch"
    per_sample: PositiveInt = 1
    top_k: PositiveInt | None = None  # None: the hardest `per_sample`


class Phase(_Closed):
    """One stretch of training: what is trained, on which losses, for how long."""

    name: str
    epochs: PositiveFloat  # one epoch shows each caption once
    batch_size: PositiveInt  # captions per device and step, before accumulation
    accumulate: PositiveInt = 1
    learning_rate: PositiveFloat
    train: dict[Part, PositiveFloat]  # part: factor on the learning rate; what is not named stays frozen
    losses: dict[LossName, PositiveFloat]
    negatives: Negatives = Negatives()
    start_learning_rate: PositiveFloat = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    decay: Literal["per_epoch", "cosine"] = "per_epoch"
    decay_per_epoch: Annotated[float, Field(gt=0, le=1)] = 0.9
    weight_decay: Weight = 0.05
    clip_norm: PositiveFloat = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    mask_share: Probability = 0.5  # of a caption's tokens, for mlm
    word_dropout: Probability = 0.0  # share of a caption's words that are masked, for all losses
    token_dropout: Probability = 0.0  # share of patches that are not shown
    score_dropout: Probability = 0.1  # share of pairs whose first-stage score is not shown
    teacher: str | None = None  # a checkpoint with the same tower
    crop_views: Annotated[int, Field(ge=0)] = 0  # crops and mirror images of each picture, besides the picture itself
    mirror: bool = True  # whether a view may be a mirror image: not where captions speak of left and right

    @model_validator(mode="after")
    def _consistent(self) -> Phase:
        if ("distillation" in self.losses) != (self.teacher is not None):
            raise ValueError("the loss 'distillation' and a `teacher` belong together")
        if "first_stage" in self.losses and "first_stage" not in self.train:
            raise ValueError("the loss 'first_stage' trains a part that `train` does not name: 'first_stage'")
        if "vision" in self.train and (self.crop_views or self.negatives.source == "corpus"):
            raise ValueError("a tower in training has no features yet: no `crop_views`, negatives from the batch")
        if self.negatives.top_k is not None and self.negatives.top_k < self.negatives.per_sample:
            raise ValueError("negatives: `top_k` is smaller than `per_sample`")
        return self


class Recipe(_Closed):
    """A whole run."""

    name: str
    seed: int = 0
    data: DataSpec
    tower: str | None = None  # one that exists, frozen: hub:NAME, timm:NAME or onnx:PATH; or else
    vision: VitConfig | None = None  # one of our own, from scratch
    image_size: PositiveInt | None = None  # pixels; None: what the tower was made for
    max_caption_pieces: PositiveInt = 61
    adapter: AdapterConfig
    joint: JointRecipe
    first_stage: FirstStageRecipe
    vocabulary: str | None = None  # vocab.txt or a source; None: that of the BERT, or else the training captions' words
    start: str | None = None  # a checkpoint whose weights are taken over where names and shapes agree
    phase: tuple[Phase, ...]
    k: PositiveInt = 10  # candidates per query in the validation after each phase
    dev_captions: PositiveInt = 1000

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.tower is None) == (self.vision is None):
            raise ValueError("give either `tower` (one that exists) or `vision` (one to train)")
        if self.vision is not None and self.image_size is None:
            raise ValueError("a tower of one's own needs an `image_size`")
        names = [phase.name for phase in self.phase]
        if not names or len(set(names)) < len(names):
            raise ValueError("phases need names, each its own")
        trains_tower = ["vision" in phase.train for phase in self.phase]
        if self.tower is not None and any(trains_tower):
            raise ValueError("a tower that exists stays frozen: no phase may train 'vision'")
        if trains_tower != sorted(trains_tower, reverse=True):
            raise ValueError("once the tower is frozen its features are kept: a later phase cannot train 'vision'")
        return self


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with changes such as `joint.kind="late"` or `phase.0.epochs=2`. Raises `RecipeError`."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    for change in changes:
        _apply(table, change)
    try:
        # As JSON, in which an array is a tuple and a table a dataclass.
        return Recipe.model_validate_json(json.dumps(table))
    except TypeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except ValidationError as error:
        told = [f"{'.'.join(map(str, each['loc'])) or 'recipe'}: {each['msg']}" for each in error.errors()]
        raise RecipeError(f"{path}: {'; '.join(told)}") from error


def _apply(table: dict[str, Any], change: str) -> None:
    """Set one value; the right side is TOML."""
    name, equals, value = change.partition("=")
    *parents, last = name.strip().split(".")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
        place: Any = table
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        place[int(last) if isinstance(place, list) else last] = parsed
    except (tomllib.TOMLDecodeError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(f"{change!r} changes nothing: write path.to.name=value, the value as in TOML") from error
    if not equals:
        raise RecipeError(f"{change!r} changes nothing: write path.to.name=value, the value as in TOML")

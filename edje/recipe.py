"""A recipe: everything a training run depends on, as one TOML file. Knows neither torch nor data.

Closed: a name nobody knows is an error. Relative paths are taken from the folder of the recipe; in a change given on
the command line, from where the command is given.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from edje.config import AdapterConfig
from edje.data.spec import DataSpec
from edje.recipe_table import change, located
from edje.tower_config import VitConfig
from protocols.validation import problems_in

Part = Literal["vision", "adapter", "text", "visual", "meeting", "first_stage"]
LossName = Literal[
    "itm", "mlm", "text_recovery", "distillation", "late_interaction", "first_stage", "regions", "grounding"
]
#: Losses that read the first stage's scores or embeddings of the training pairs.
_ASKS_FIRST_STAGE = {"itm", "distillation", "text_recovery"}
Weight = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class RecipeError(ValueError):
    """The recipe cannot be followed; the message says where."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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
    For negatives from the corpus, `pool_images` are searched together: as many as at test time.
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
    pool_images: PositiveInt | None = 1000  # None: all of them; with `cca` a fold is a pool


class Negatives(_Closed):
    """`per_sample` for each caption and each image, drawn from the `top_k` that the first stage ranks highest.

    From the `batch` (all devices' together, as in the paper), or from the `corpus`: what the first stage, cross-fitted,
    would hand over at test time; a caption whose image is not among the best `top_k` is not ranked and has none. Take
    it where the head reads a weak first stage: beside the worst mistakes of a batch, what is right scores low.
    """

    source: Literal["batch", "corpus"] = "batch"
    per_sample: PositiveInt = 1
    top_k: PositiveInt | None = None  # None: the hardest `per_sample`


class Start(_Closed):
    """Parts of another checkpoint to begin with; their names and shapes must agree with this model's."""

    checkpoint: str
    parts: tuple[Part, ...]


class Phase(_Closed):
    """One stretch of training: what is trained, on which losses, for how long."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # also of a folder
    epochs: PositiveFloat  # one epoch shows each caption once
    batch_size: PositiveInt  # captions per device and step, before accumulation
    accumulate: PositiveInt = 1
    learning_rate: PositiveFloat
    # part: factor on the learning rate; what is not named stays frozen
    train: Annotated[dict[Part, PositiveFloat], Field(min_length=1)]
    losses: Annotated[dict[LossName, PositiveFloat], Field(min_length=1)]
    negatives: Negatives = Negatives()
    groups_together: bool = False  # a batch holds whole groups of images that were made to be confused
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
        if ("first_stage" in self.losses) != ("first_stage" in self.train):
            raise ValueError("the loss 'first_stage' and the part 'first_stage' in `train` belong together")
        moving, asking = self.train.keys() & {"vision", "first_stage"}, self.losses.keys() & _ASKS_FIRST_STAGE
        if moving and asking:
            raise ValueError(
                f"the loss {min(asking)!r} asks a first stage that stands still: leave it to a later phase, or take "
                f"{min(moving)!r} out of `train`"
            )
        if "vision" in self.train and (self.crop_views or self.negatives.source == "corpus"):
            raise ValueError("a tower in training has no features yet: no `crop_views`, negatives from the batch")
        if self.negatives.top_k is not None and self.negatives.top_k < self.negatives.per_sample:
            raise ValueError("negatives: `top_k` is smaller than `per_sample`")
        return self


class Recipe(_Closed):
    """A whole run."""

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataSpec
    tower: str | None = None  # one that exists, frozen: hub:NAME, timm:NAME or onnx:PATH; or else
    vision: VitConfig | None = None  # one of our own, from scratch
    image_size: PositiveInt | None = None  # pixels; None: what the tower was made for
    keeps_patches: bool = True  # what the tower sees lies on the disk; else the tower runs in every step
    max_caption_pieces: PositiveInt = 61
    adapter: AdapterConfig
    joint: JointRecipe
    first_stage: FirstStageRecipe
    vocabulary: str | None = None  # vocab.txt or a source; None: that of the BERT, or else the training captions' words
    start: Start | None = None
    skip: tuple[str, ...] = ()  # phases that are not run, because what they would give comes with `start`
    calibrate: bool = False  # at the end the dev split says how much the first stage's score counts
    phase: tuple[Phase, ...]
    k: PositiveInt = 10  # candidates per query in the validation after each phase
    dev_captions: PositiveInt = 1000

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those that are run."""
        return tuple(phase for phase in self.phase if phase.name not in self.skip)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.tower is None) == (self.vision is None):
            raise ValueError("give either `tower` (one that exists) or `vision` (one to train)")
        if self.vision is not None and self.image_size is None:
            raise ValueError("a tower of one's own needs an `image_size`")
        names = [phase.name for phase in self.phase]
        if not self.phases or len(set(names)) < len(names):
            raise ValueError("phases need names, each its own")
        if self.calibrate and not self.joint.reads_first_stage:
            raise ValueError("`calibrate` weighs the first stage's score: it needs joint.reads_first_stage")
        if unknown := set(self.skip) - set(names):
            raise ValueError(f"skip: there is no phase {min(unknown)!r}")
        trains_tower = ["vision" in phase.train for phase in self.phases]
        if self.tower is not None and any(trains_tower):
            raise ValueError("a tower that exists stays frozen: no phase may train 'vision'")
        if not self.keeps_patches and any(phase.crop_views for phase in self.phases):
            raise ValueError("`crop_views` are kept like the pictures themselves: they need `keeps_patches`")
        if trains_tower != sorted(trains_tower, reverse=True):
            raise ValueError("once the tower is frozen its features are kept: a later phase cannot train 'vision'")
        return self

    @model_validator(mode="after")
    def _losses_have_their_parts(self) -> Recipe:
        kind = self.first_stage.kind
        is_known = kind != "dual" or (self.start is not None and "first_stage" in self.start.parts)
        for phase in self.phases:
            if "late_interaction" in phase.losses and (self.joint.kind == "full" or not self.joint.match_dim):
                raise ValueError(
                    "the loss 'late_interaction' needs a joint encoder of another kind, with a `match_dim`"
                )
            if "regions" in phase.losses and (self.data.kind != "scenes" or "vision" not in phase.train):
                raise ValueError("the loss 'regions' teaches a tower what stands where, which only drawn scenes say")
            if "grounding" in phase.losses and (self.data.kind != "scenes" or self.joint.num_layers in (0, 1)):
                raise ValueError(
                    "the loss 'grounding' teaches words, in a joint encoder of two layers or more, what they say of a "
                    "picture: only drawn scenes know it"
                )
            if "first_stage" in phase.losses and kind != "dual":
                raise ValueError(f"a first stage of kind {kind!r} is not trained: the loss 'first_stage' is for 'dual'")
            if not is_known and phase.losses.keys() & _ASKS_FIRST_STAGE:
                raise ValueError(f"phase {phase.name!r} asks a first stage that no earlier phase has trained")
            is_known = is_known or "first_stage" in phase.losses
        if kind == "hub" and self.first_stage.source is None and not (self.tower or "").startswith("hub:"):
            raise ValueError("a first stage of kind 'hub' belongs to a tower hub:NAME, or names its `source`")
        return self


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with changes such as `joint.kind="late"` or `phase.0.epochs=2`.

    Raises `RecipeError`.
    """
    try:
        table = located(tomllib.loads(path.read_text(encoding="utf-8")), path.parent)
    except (OSError, ValueError) as error:  # not there, not TOML, or not UTF-8
        raise RecipeError(f"{path} cannot be read: {error}") from error
    try:
        for each in changes:
            change(table, each)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    try:
        # As JSON, in which an array is a tuple and a table a dataclass.
        return Recipe.model_validate_json(json.dumps(located(table, Path())))
    except TypeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except ValidationError as error:
        raise RecipeError(f"{path}: {'; '.join(problems_in(error, root='recipe'))}") from error

"""A recipe: everything that a training run depends on, as frozen data. Knows neither torch nor files.

`edje.recipe_file` reads one from TOML. `python -m edje.recipe_reference` prints every field with its meaning.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from edje.config import AdapterConfig
from edje.data.spec import DataSpec
from edje.tower_config import VitConfig

Part = Literal["vision", "adapter", "text", "visual", "meeting", "first_stage"]
LossName = Literal[
    "itm",
    "mlm",
    "text_recovery",
    "distillation",
    "margin_mse",
    "kl",
    "late_interaction",
    "first_stage",
    "regions",
    "grounding",
]
#: Losses that compare a student with a teacher.
TEACHER_LOSSES = {"distillation", "margin_mse", "kl"}
#: Losses of scored pairs, with negatives.
PAIR_LOSSES = TEACHER_LOSSES | {"itm"}
#: Losses that need the first stage's scores or embeddings of the training pairs.
_FIRST_STAGE_READERS = PAIR_LOSSES | {"text_recovery"}
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class RecipeError(ValueError):
    """The recipe cannot be used; the message names the field and what to change."""


class _Closed(BaseModel):
    """Refuses unknown fields and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class JointRecipe(_Closed):
    """The joint encoder."""

    kind: Literal["full", "late", "minimal", "maxsim"] = Field(
        "full",
        description="Where text and image are read together: from the first layer (`full`), after separate layers, in "
        "layers that update both (`late`) or the text alone (`minimal`), or only in a product of tokens (`maxsim`).",
    )
    dim: PositiveInt | None = Field(None, description="Width of the states. None: that of `bert`.")
    num_heads: PositiveInt | None = Field(None, description="Attention heads of a layer. None: those of `bert`.")
    hidden_dim: PositiveInt | None = Field(None, description="Width of the MLP in a layer. None: that of `bert`.")
    num_layers: Count | None = Field(
        None, description="Layers that read text and image together. None: all layers of `bert`, for `full`."
    )
    text_layers: Count = Field(0, description="Layers that read the text alone, once per query.")
    visual_layers: Count = Field(0, description="Layers that read the visual tokens alone, once per image, offline.")
    match_dim: Count = Field(0, description="Width in which text and visual tokens are compared. 0: not compared.")
    bert: str | None = Field(
        None,
        description="A BERT that gives weights, sizes and vocabulary: a folder, `package:NAME/folder` or `hub:NAME`. "
        "None: random weights.",
    )
    bert_layers: tuple[int, ...] | None = Field(
        None, description="Layers of `bert` whose weights the layers for text and image start from. None: chosen."
    )
    bert_visual_layers: tuple[int, ...] | None = Field(
        None, description="Layers of `bert` whose weights the visual layers start from. None: random weights."
    )


class FirstStageRecipe(_Closed):
    """The first stage, which finds the candidates that the model reranks."""

    kind: Literal["cca", "dual", "hub"] = Field(
        description="`cca`: fitted in closed form before the first phase. `dual`: trained by the phases that train the "
        "part `first_stage`. `hub`: the published pair of encoders that the tower belongs to (SigLIP, CLIP)."
    )
    dim: PositiveInt = Field(128, description="Width of the embeddings.")
    folds: int = Field(5, ge=2, description="Folds of the cross-fitting of `cca`.")
    ridge: PositiveFloat = Field(0.5, description="Ridge penalty of `cca`.")
    correlation_power: NonNegative = Field(1.0, description="Power of the canonical correlations that weigh `cca`.")
    image_power: PositiveFloat = Field(
        0.5, description="Power applied to pooled embeddings before `cca`; below 1 it damps large values."
    )
    text_dim: PositiveInt = Field(64, description="Width of the text encoder of `dual`.")
    num_layers: Count = Field(1, description="Layers of the text encoder of `dual`.")
    num_heads: PositiveInt = Field(4, description="Attention heads of the text encoder of `dual`.")
    source: str | None = Field(None, description="The model on the hub for the kind `hub`. None: that of the tower.")
    pool_images: PositiveInt | None = Field(
        1000,
        description="Number of images that are searched together for negatives from the corpus, as many as in a search "
        "after training. None: all. With `cca` a fold is searched together.",
    )


class Negatives(_Closed):
    """The negative pairs."""

    source: Literal["batch", "corpus", "lists"] = Field(
        "batch",
        description="`batch`: from the batches of all devices, as in the paper. `corpus`: from the candidates that the "
        "first stage retrieves in the whole data; captions whose image it does not retrieve have no negatives. "
        "`lists`: from the candidate lists or labels of the data.",
    )
    per_sample: PositiveInt = Field(1, description="Negative images of each caption, and captions of each image.")
    top_k: PositiveInt | None = Field(
        None, description="Negatives are drawn from this many with the highest scores. None: `per_sample`."
    )


class Start(_Closed):
    """Parts of another checkpoint to start from."""

    checkpoint: str = Field(description="Folder of the checkpoint. Its parts must have the same names and shapes.")
    parts: tuple[Part, ...] = Field(description="The parts that are loaded.")


class Phase(_Closed):
    """One phase of training."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]+$", description="Name of the phase, and of the folder of its checkpoint in `after/`."
    )
    epochs: PositiveFloat = Field(description="Passes over all captions.")
    batch_size: PositiveInt = Field(description="Captions in a batch on each device.")
    accumulate: PositiveInt = Field(1, description="Batches whose gradients are added up for one step.")
    learning_rate: PositiveFloat = Field(description="Learning rate after the warm-up.")
    train: dict[Part, PositiveFloat] = Field(
        min_length=1,
        description="Parts that are trained, each with a factor on the learning rate: `vision`, `adapter`, `text`, "
        "`visual`, `meeting` (the layers for text and image, and the head), `first_stage`. All others are frozen.",
    )
    losses: dict[LossName, PositiveFloat] = Field(
        min_length=1,
        description="The losses, each with its weight. `itm`: a pair among its negatives. `mlm`: masked words. "
        "`text_recovery`: the first stage's embedding of the text. `distillation`, `margin_mse`, `kl`: the teacher's "
        "scores, as probabilities of pairs, as margins between positive and negatives, or as a distribution. "
        "`late_interaction`: contrast of token similarities in the batch. `first_stage`: contrast of the first stage's "
        "embeddings in the batch. `regions`, `grounding`: labels of drawn scenes.",
    )
    negatives: Negatives = Field(Negatives(), description="The negative pairs of the losses of pairs.")
    groups_together: bool = Field(
        False, description="Whether a batch consists of whole groups: drawn scenes with their confusers."
    )
    start_learning_rate: PositiveFloat = Field(1e-6, description="Learning rate at the start of the warm-up.")
    warmup_steps: Count = Field(100, description="Steps of the linear warm-up.")
    decay: Literal["per_epoch", "cosine"] = Field(
        "per_epoch", description="Decay of the learning rate: by a factor after each epoch, or along a cosine to zero."
    )
    decay_per_epoch: float = Field(0.9, gt=0, le=1, description="Factor of the decay `per_epoch`.")
    weight_decay: NonNegative = Field(0.05, description="Weight decay of matrices.")
    clip_norm: PositiveFloat = Field(1.0, description="Gradients with a larger norm are scaled down to it.")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Type of the computation. bf16 falls back to fp32 on devices without it in hardware."
    )
    mask_share: Probability = Field(0.5, description="Share of a caption's tokens that the loss `mlm` masks.")
    word_dropout: Probability = Field(0.0, description="Share of a caption's tokens that are masked for all losses.")
    token_dropout: Probability = Field(0.0, description="Share of patch tokens that are set to zero.")
    teacher: str | None = Field(
        None,
        description="Checkpoint of the teacher for `distillation`, `margin_mse` and `kl`, with the same tower and "
        "vocabulary. None: the teacher's scores in the data.",
    )
    teacher_scale: PositiveFloat = Field(
        1.0, description="Factor on the teacher's scores, for scores that are not logits: cosines need about 20."
    )
    validate_every: PositiveInt | None = Field(
        None,
        description="Steps between two validations within the phase, each of which writes the checkpoint of the phase. "
        "None: one validation after the last step.",
    )
    patience: PositiveInt | None = Field(
        None, description="Validations without a better recall after which the phase ends early. None: never."
    )
    keep: Literal["last", "best"] = Field(
        "last", description="Whether the phase ends with the weights of its last step or of its best validation."
    )
    crop_views: Count = Field(0, description="Augmented views of each image (crops, mirror images), besides itself.")
    mirror: bool = Field(
        True, description="Whether views may be mirrored. False where captions distinguish left and right."
    )

    @property
    def first_stage_readers(self) -> set[str]:
        """The losses of this phase that need the first stage's scores or embeddings."""
        readers = {str(name) for name in self.losses} & _FIRST_STAGE_READERS
        return readers - PAIR_LOSSES if self.negatives.source == "lists" else readers

    @model_validator(mode="after")
    def _is_consistent(self) -> Phase:
        if self.teacher is not None and not TEACHER_LOSSES & self.losses.keys():
            raise ValueError("`teacher` needs one of the losses 'distillation', 'margin_mse' and 'kl'")
        if ("first_stage" in self.losses) != ("first_stage" in self.train):
            raise ValueError(
                "the loss 'first_stage' and the part 'first_stage' in `train` need each other: set both or neither"
            )
        changing = self.train.keys() & {"vision", "first_stage"}
        reading = self.first_stage_readers
        if changing and reading:
            raise ValueError(
                f"the loss {min(reading)!r} reads the first stage, which changes while {min(changing)!r} is trained: "
                f"move the loss to a later phase, or remove {min(changing)!r} from `train`"
            )
        if "vision" in self.train and (self.crop_views or self.negatives.source == "corpus"):
            raise ValueError(
                "a phase that trains 'vision' has no stored features: set crop_views to 0 and negatives.source to "
                "'batch'"
            )
        if self.validate_every is None and (self.patience is not None or self.keep == "best"):
            raise ValueError("`patience` and keep = 'best' compare validations within the phase: set validate_every")
        if self.negatives.top_k is not None and self.negatives.top_k < self.negatives.per_sample:
            raise ValueError("negatives: `top_k` is smaller than `per_sample`")
        return self


class Recipe(_Closed):
    """A training run."""

    name: str = Field(description="Name of the model.")
    seed: Count = Field(0, description="Seed of all random draws.")
    data: DataSpec = Field(description="The images and captions.")
    tower: str | None = Field(
        None,
        description="A published vision tower, which stays frozen: `hub:NAME`, `timm:NAME` or `onnx:PATH`. Excludes "
        "`vision`.",
    )
    vision: VitConfig | None = Field(
        None, description="A vision tower that is trained from random weights. Excludes `tower`."
    )
    image_size: PositiveInt | None = Field(
        None, description="Side of the images in pixels. None: the size that the tower was trained with."
    )
    keeps_patches: bool = Field(
        True, description="Whether patch tokens are stored on the disk. False: the tower runs in every step."
    )
    max_caption_pieces: PositiveInt = Field(61, description="Word pieces after which a caption is truncated.")
    adapter: AdapterConfig = Field(description="The adapter, which maps patch tokens to stored visual tokens.")
    joint: JointRecipe = Field(description="The joint encoder.")
    first_stage: FirstStageRecipe = Field(description="The first stage.")
    vocabulary: str | None = Field(
        None,
        description="`vocab.txt`, `tokenizer.json`, or a folder that contains one. None: that of `joint.bert`, or else "
        "the words of the training captions.",
    )
    start: Start | None = Field(None, description="Parts of another checkpoint to start from.")
    skip: tuple[str, ...] = Field((), description="Names of phases that are left out, because `start` replaces them.")
    calibrate: bool = Field(
        True, description="Whether the calibration of scores is fitted on the split dev after the last phase."
    )
    phase: tuple[Phase, ...] = Field(description="The phases, in order.")
    k: PositiveInt = Field(10, description="Candidates per query in the validation after each phase.")
    dev_captions: PositiveInt = Field(1000, description="Captions of the split dev that validation uses as queries.")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that are not skipped."""
        return tuple(phase for phase in self.phase if phase.name not in self.skip)

    @model_validator(mode="after")
    def _is_consistent(self) -> Recipe:
        if (self.tower is None) == (self.vision is None):
            raise ValueError("set either `tower` (published, frozen) or `vision` (trained from random weights)")
        if self.vision is not None and self.image_size is None:
            raise ValueError("`vision` needs an `image_size`")
        names = [phase.name for phase in self.phase]
        if not self.phases or len(set(names)) < len(names):
            raise ValueError("the recipe needs at least one phase that is not skipped, and every phase another name")
        if unknown := set(self.skip) - set(names):
            raise ValueError(f"skip: there is no phase {min(unknown)!r}, but {', '.join(names)}")
        trains_tower = ["vision" in phase.train for phase in self.phases]
        if self.tower is not None and any(trains_tower):
            raise ValueError("a published tower stays frozen: remove 'vision' from `train`")
        if not self.keeps_patches and any(phase.crop_views for phase in self.phases):
            raise ValueError("`crop_views` need stored features: set keeps_patches = true")
        if trains_tower != sorted(trains_tower, reverse=True):
            raise ValueError("a phase trains 'vision' after a phase that has stored the tower's features: reorder them")
        return self

    @model_validator(mode="after")
    def _losses_have_their_parts(self) -> Recipe:
        kind = self.first_stage.kind
        is_trained = kind != "dual" or (self.start is not None and "first_stage" in self.start.parts)
        for phase in self.phases:
            if "late_interaction" in phase.losses and (self.joint.kind == "full" or not self.joint.match_dim):
                raise ValueError("the loss 'late_interaction' needs a joint.match_dim and a joint.kind other than full")
            if "regions" in phase.losses and (self.data.kind != "scenes" or "vision" not in phase.train):
                raise ValueError("the loss 'regions' needs data.kind = 'scenes', and 'vision' in `train`")
            if "grounding" in phase.losses and (self.data.kind != "scenes" or self.joint.num_layers in (0, 1)):
                raise ValueError("the loss 'grounding' needs data.kind = 'scenes' and joint.num_layers of at least 2")
            if "first_stage" in phase.losses and kind != "dual":
                raise ValueError(f"the loss 'first_stage' is for a first stage of kind 'dual'; this one is {kind!r}")
            if not is_trained and phase.first_stage_readers:
                raise ValueError(
                    f"phase {phase.name!r} reads the first stage, but no earlier phase trains it: add a phase with the "
                    "loss 'first_stage'"
                )
            is_trained = is_trained or "first_stage" in phase.losses
        if kind == "hub" and self.first_stage.source is None and not (self.tower or "").startswith("hub:"):
            raise ValueError("a first stage of kind 'hub' needs a tower `hub:NAME` or its `source`")
        return self

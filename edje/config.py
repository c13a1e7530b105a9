"""The configuration of a model as frozen dataclasses, and its canonical JSON.

Knows neither torch nor files; `edje.model.variants` has named configurations.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from edje.calibration import Calibration
from edje.tower_config import CLOSED as _CLOSED
from edje.tower_config import Count, VisionConfig


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Maps patch tokens to the visual tokens that are stored.

    Kinds:
        compression: one cross-attention layer from `num_tokens` learned queries.
        local: an MLP on each patch (the teacher of the distillation).
        decoder: `num_layers` decoder layers from `num_tokens` learned queries, in the joint encoder's width (VEDJE).

    `places` adds a learned vector for each patch position to the projected patches (in a decoder to the keys), for
    towers whose patch tokens do not encode their position (docs/LOG.md). The published models have none.
    """

    __pydantic_config__ = _CLOSED

    kind: Annotated[
        Literal["compression", "local", "decoder"],
        Field(
            description="`compression`: one cross-attention layer from learned queries. `local`: an MLP on each patch. "
            "`decoder`: decoder layers from learned queries."
        ),
    ]
    num_tokens: Annotated[
        Count, Field(description="Visual tokens that are stored of an image. For `local`, the number of patches.")
    ]
    hidden_dim: Annotated[Count, Field(description="Width of the MLP.")] = 8192
    num_layers: Annotated[Count, Field(description="Layers of a `decoder`.")] = 2
    places: Annotated[
        bool,
        Field(
            description="Whether a learned vector is added for each patch position, for towers whose patch tokens do "
            "not encode it."
        ),
    ] = False


@dataclass(frozen=True, slots=True)
class JointConfig:
    """The joint encoder: reads a caption and an image's visual tokens, in BERT layout.

    Kinds:
        full: the paper's encoder; every layer reads text and image.
        late: `text_layers` read the text (once per query), `visual_layers` the image (once per image, offline), then
            `num_layers` fusion layers update both.
        minimal: the same, but the fusion layers update the text alone.
        maxsim: no fusion layers; the logit is the late interaction of text and visual tokens.

    `vocab_size` includes the `<image>` token; `sep_id` is the token that closes the sequence of `full`.
    """

    __pydantic_config__ = _CLOSED

    dim: Count
    num_layers: Annotated[int, Field(ge=0)]
    num_heads: Count
    hidden_dim: Count
    vocab_size: Count
    sep_id: int
    max_positions: Count = 512
    norm_eps: float = 1e-12
    kind: Literal["full", "late", "minimal", "maxsim"] = "full"
    text_layers: Annotated[int, Field(ge=0)] = 0
    visual_layers: Annotated[int, Field(ge=0)] = 0
    match_dim: Annotated[int, Field(ge=0)] = 0  # width of the late interaction; 0 without late interaction
    first_stage: None = None  # unused; the key is part of the digest of existing checkpoints

    @property
    def is_late_fusion(self) -> bool:
        """Whether text and image are encoded separately before the fusion layers."""
        return self.kind != "full"

    def __post_init__(self) -> None:
        if self.kind == "full" and (self.text_layers or self.visual_layers or self.match_dim):
            raise ValueError("kind 'full' needs text_layers, visual_layers and match_dim to be 0")
        if (self.kind == "maxsim") != (self.num_layers == 0):
            raise ValueError(f"kind {self.kind!r} cannot have num_layers {self.num_layers}: only 'maxsim' has 0")
        if self.kind == "maxsim" and not self.match_dim:
            raise ValueError("kind 'maxsim' needs a match_dim")


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """Preprocessing of images and captions.

    Every image is resized to a square without cropping, even where the tower's published preprocessing crops.
    """

    __pydantic_config__ = _CLOSED

    image_size: Count
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: Literal["bilinear", "bicubic"] = "bilinear"  # SigLIP 2; SigLIP 1 and CLIP were trained on bicubic
    canonical_captions: bool = True  # lower case, punctuation removed
    max_caption_pieces: Count = 61  # word pieces, without [CLS] and [SEP]

    @property
    def max_text_tokens(self) -> int:
        """Word pieces with the caption's [CLS] and [SEP]."""
        return self.max_caption_pieces + 2


@dataclass(frozen=True, slots=True)
class EdjeConfig:
    """The whole model. `trained` is False for random weights."""

    __pydantic_config__ = _CLOSED

    name: str
    trained: bool
    preprocess: PreprocessConfig
    vision: VisionConfig
    adapter: AdapterConfig
    joint: JointConfig
    calibration: Calibration | None = None  # None: the sigmoid of a logit is not a probability

    def __post_init__(self) -> None:
        vision, joint, adapter = self.vision, self.joint, self.adapter
        if vision.dim % vision.num_heads or joint.dim % joint.num_heads:
            raise ValueError(
                f"the widths {vision.dim} (vision) and {joint.dim} (joint) must be multiples of the numbers of heads, "
                f"{vision.num_heads} and {joint.num_heads}"
            )
        num_patches = self.num_patches  # raises if the image size is no multiple of the patch size
        if adapter.kind == "local" and adapter.num_tokens != num_patches:
            raise ValueError(
                f"adapter.num_tokens is {adapter.num_tokens}: a local adapter has one for each of {num_patches} patches"
            )
        if joint.max_positions < self.max_sequence:
            raise ValueError(
                f"joint.max_positions is {joint.max_positions}: sequences have up to {self.max_sequence} tokens"
            )
        if not 0 <= joint.sep_id < joint.vocab_size:
            raise ValueError(f"joint.sep_id is {joint.sep_id}, beyond the vocabulary of {joint.vocab_size} tokens")

    @property
    def num_patches(self) -> int:
        return self.vision.num_tokens(self.preprocess.image_size)

    @property
    def max_sequence(self) -> int:
        """Length of the longest sequence with position embeddings.

        The caption with [CLS] and [SEP]; for kind `full` also the visual tokens and the last [SEP].
        """
        num_text = self.preprocess.max_text_tokens
        return num_text if self.joint.is_late_fusion else num_text + self.adapter.num_tokens + 1


@cache
def _adapter() -> TypeAdapter[EdjeConfig]:
    return TypeAdapter(EdjeConfig)


def canonical_json(config: EdjeConfig) -> str:
    """The configuration as JSON with sorted keys and no spaces, the input of digests."""
    return json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))


def parse_config(text: str) -> EdjeConfig:
    """The inverse of `canonical_json`. Raises `ValueError` for unknown, missing or ill-typed fields."""
    return _adapter().validate_json(text)

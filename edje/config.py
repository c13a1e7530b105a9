"""The numbers a model is made of, as frozen data, and their canonical JSON.

Knows neither torch nor files; `edje.model.variants` has named instances.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from edje.tower_config import CLOSED as _CLOSED
from edje.tower_config import Count, VisionConfig


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """From patch tokens to the visual tokens that are stored.

    `compression` attends from `num_tokens` learned queries; `local` maps every patch by itself (the teacher);
    `decoder` is compression by `num_layers` decoder layers in the joint encoder's width, as VEDJE does it.
    With `places` a learned vector for each patch joins what is made of it, in a decoder its key: for towers whose
    patches do not tell where they lie (docs/LOG.md). Off is the published form of each.
    """

    __pydantic_config__ = _CLOSED

    kind: Literal["compression", "local", "decoder"]
    num_tokens: Count
    hidden_dim: Count = 8192
    num_layers: Count = 2  # of a decoder
    places: bool = False


@dataclass(frozen=True, slots=True)
class FirstStageConfig:
    """How a first-stage score enters the head: standardised with the training pairs' `mean` and `std`."""

    __pydantic_config__ = _CLOSED

    mean: float
    std: Annotated[float, Field(gt=0)]
    hidden_dim: Count = 64


@dataclass(frozen=True, slots=True)
class JointConfig:
    """What reads a caption and an image's visual tokens, in BERT layout.

    `full` is the paper's encoder: every layer reads both. The others read text and image apart first, in `text_layers`
    (once per query) and `visual_layers` (once per image, offline), and meet later: `late` in `num_layers` layers over
    both, `minimal` in `num_layers` layers that update the text alone, `maxsim` in no layer at all.
    `vocab_size` counts the `<image>` token, `sep_id` closes the sequence of `full`.
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
    match_dim: Annotated[int, Field(ge=0)] = 0  # width in which text and visual tokens are compared; 0: they are not
    first_stage: FirstStageConfig | None = None  # the head reads the first stage's score as well

    @property
    def apart(self) -> bool:
        """Whether text and image are read apart before they meet."""
        return self.kind != "full"

    def __post_init__(self) -> None:
        if self.kind == "full" and (self.text_layers or self.visual_layers or self.match_dim):
            raise ValueError(
                "0 text layers, 0 visual layers and no matching belong to kind 'full': it reads all at once"
            )
        if (self.kind == "maxsim") != (self.num_layers == 0):
            raise ValueError(f"{self.num_layers} layers after the meeting do not make the kind {self.kind!r}")
        if self.kind == "maxsim" and not self.match_dim:
            raise ValueError("kind 'maxsim' compares tokens: its match_dim cannot be 0")


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """What happens to pixels and captions before the model sees them.

    Every picture is squeezed to a square, whatever its tower's published preprocessing does.
    """

    __pydantic_config__ = _CLOSED

    image_size: Count
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: Literal["bilinear", "bicubic"] = "bilinear"  # of SigLIP 2; SigLIP 1 and CLIP were trained on bicubic
    canonical_captions: bool = True  # lower case, punctuation removed, as in training
    max_caption_pieces: Count = 61  # word pieces, without [CLS] and [SEP]

    @property
    def max_text_tokens(self) -> int:
        """Word pieces with the caption's own [CLS] and [SEP]."""
        return self.max_caption_pieces + 2


@dataclass(frozen=True, slots=True)
class EdjeConfig:
    """The whole model. `trained` is False for weights that only have the right shape."""

    __pydantic_config__ = _CLOSED

    name: str
    trained: bool
    preprocess: PreprocessConfig
    vision: VisionConfig
    adapter: AdapterConfig
    joint: JointConfig

    def __post_init__(self) -> None:
        vision, joint, adapter = self.vision, self.joint, self.adapter
        if vision.dim % vision.num_heads or joint.dim % joint.num_heads:
            raise ValueError(
                f"widths {vision.dim} and {joint.dim} do not divide into {vision.num_heads} and {joint.num_heads} heads"
            )
        num_patches = self.num_patches  # refuses an image that is no whole number of patches
        if adapter.kind == "local" and adapter.num_tokens != num_patches:
            raise ValueError(f"a local adapter keeps all {num_patches} patch tokens, not {adapter.num_tokens}")
        if joint.max_positions < self.max_sequence:
            raise ValueError(f"{joint.max_positions} positions for sequences of {self.max_sequence} tokens")
        if not 0 <= joint.sep_id < joint.vocab_size:
            raise ValueError(f"[SEP] is token {joint.sep_id} of a vocabulary of {joint.vocab_size}")

    @property
    def num_patches(self) -> int:
        return self.vision.num_tokens(self.preprocess.image_size)

    @property
    def max_sequence(self) -> int:
        """The longest sequence that shares BERT's positions: the caption with [CLS] and [SEP], and for an encoder that
        reads all at once the visual tokens and the last [SEP]."""
        num_text = self.preprocess.max_text_tokens
        return num_text if self.joint.apart else num_text + self.adapter.num_tokens + 1


@cache
def _adapter() -> TypeAdapter[EdjeConfig]:
    return TypeAdapter(EdjeConfig)


def canonical_json(config: EdjeConfig) -> str:
    """One spelling per configuration: sorted keys, no spaces. Digests are taken over it."""
    return json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))


def parse_config(text: str) -> EdjeConfig:
    """The inverse of `canonical_json`. Raises `ValueError` for unknown, missing or ill-typed fields."""
    return _adapter().validate_json(text)

"""The numbers a model is made of, as frozen data, and their canonical JSON.

Knows neither torch nor files; `edje.variants` has named instances.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

Count = Annotated[int, Field(gt=0)]

_CLOSED = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A vision tower in SigLIP layout: square patches, no class token, an attention head that pools."""

    __pydantic_config__ = _CLOSED

    patch_size: Count
    dim: Count
    num_layers: Count
    num_heads: Count
    hidden_dim: Count
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """From patch tokens to the visual tokens that are stored.

    `compression` attends from `num_tokens` learned queries; `local` maps every patch by itself (the teacher).
    """

    __pydantic_config__ = _CLOSED

    kind: Literal["compression", "local"]
    num_tokens: Count
    hidden_dim: Count = 8192


@dataclass(frozen=True, slots=True)
class JointConfig:
    """A joint encoder in BERT layout. `vocab_size` counts the `<image>` token, `sep_id` closes the sequence."""

    __pydantic_config__ = _CLOSED

    dim: Count
    num_layers: Count
    num_heads: Count
    hidden_dim: Count
    vocab_size: Count
    sep_id: int
    max_positions: Count = 512
    norm_eps: float = 1e-12


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """What happens to pixels and captions before the model sees them."""

    __pydantic_config__ = _CLOSED

    image_size: Count
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
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
        if self.preprocess.image_size % vision.patch_size:
            raise ValueError(
                f"{self.preprocess.image_size} pixels are no whole number of {vision.patch_size}-pixel patches"
            )
        if vision.dim % vision.num_heads or joint.dim % joint.num_heads:
            raise ValueError(
                f"widths {vision.dim} and {joint.dim} do not divide into {vision.num_heads} and {joint.num_heads} heads"
            )
        if adapter.kind == "local" and adapter.num_tokens != self.num_patches:
            raise ValueError(f"a local adapter keeps all {self.num_patches} patch tokens, not {adapter.num_tokens}")
        if joint.max_positions < self.max_sequence:
            raise ValueError(f"{joint.max_positions} positions for sequences of {self.max_sequence} tokens")
        if not 0 <= joint.sep_id < joint.vocab_size:
            raise ValueError(f"[SEP] is token {joint.sep_id} of a vocabulary of {joint.vocab_size}")

    @property
    def num_patches(self) -> int:
        return int((self.preprocess.image_size // self.vision.patch_size) ** 2)

    @property
    def max_sequence(self) -> int:
        """The longest joint sequence: caption with [CLS] and [SEP], visual tokens, last [SEP]."""
        return self.preprocess.max_text_tokens + self.adapter.num_tokens + 1


@cache
def _adapter() -> TypeAdapter[EdjeConfig]:
    return TypeAdapter(EdjeConfig)


def canonical_json(config: EdjeConfig) -> str:
    """One spelling per configuration: sorted keys, no spaces. Digests are taken over it."""
    return json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))


def parse_config(text: str) -> EdjeConfig:
    """The inverse of `canonical_json`. Raises `ValueError` for unknown, missing or ill-typed fields."""
    return _adapter().validate_json(text)

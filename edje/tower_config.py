"""The numbers a vision tower is made of, one frozen class per kind of tower.

Knows neither torch nor the libraries that bring towers; `edje.towers.base` builds what is described here. Whatever the
kind, a configuration says how wide its patch tokens are (`dim`), how many there are for a square image
(`num_tokens`), how wide the pooled embedding is (`pooled_dim`), and with how many heads and which LayerNorm epsilon
the adapter reads them (`num_heads`, `norm_eps`: the tower's own where it has any).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(gt=0)]

CLOSED = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class VitConfig:
    """The tower of `edje.towers.vit`: SigLIP layout, square patches, no class token, an attention head that pools.

    With the stem `conv` a few small convolutions with stride 2 lead to the same grid: a small tower that is trained
    from scratch learns much faster with it. `patch` is SigLIP's one large convolution.
    """

    __pydantic_config__ = CLOSED

    patch_size: Count
    dim: Count
    num_layers: Count
    num_heads: Count
    hidden_dim: Count
    norm_eps: float = 1e-6
    stem: Literal["patch", "conv"] = "patch"
    kind: Literal["vit"] = "vit"

    def __post_init__(self) -> None:
        if self.stem == "patch":
            return
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"a conv stem halves the image again and again; {self.patch_size} is no power of two")
        if self.dim % (self.patch_size // 2):
            raise ValueError(f"a conv stem to {self.patch_size}-pixel patches cannot double its way to {self.dim}")

    @property
    def pooled_dim(self) -> int:
        return self.dim

    def num_tokens(self, image_size: int) -> int:
        return _grid(image_size, self.patch_size)


@dataclass(frozen=True, slots=True)
class HubVisionConfig:
    """A tower of the transformers library. SigLIP 2 at a fixed resolution is a `siglip_vision_model` as well."""

    __pydantic_config__ = CLOSED

    architecture: Literal["siglip_vision_model", "clip_vision_model"]
    patch_size: Count
    dim: Count
    num_layers: Count
    num_heads: Count
    hidden_dim: Count
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "quick_gelu"]
    norm_eps: float
    hidden_state: Literal["last", "penultimate"]  # the last one is taken after the tower's closing LayerNorm
    keep_class_token: bool = False
    kind: Literal["transformers"] = "transformers"

    def __post_init__(self) -> None:
        if self.keep_class_token and self.architecture == "siglip_vision_model":
            raise ValueError("a siglip_vision_model has no class token to keep")

    @property
    def pooled_dim(self) -> int:
        return self.dim

    def num_tokens(self, image_size: int) -> int:
        return _grid(image_size, self.patch_size) + self.keep_class_token


@dataclass(frozen=True, slots=True)
class TimmVisionConfig:
    """A tower of the timm library, by the model's name: any that ends in a grid of features or in tokens."""

    __pydantic_config__ = CLOSED

    model_name: str
    dim: Count
    tokens_per_image: Count
    pooled_dim: Count
    num_heads: Count
    norm_eps: float = 1e-6
    kind: Literal["timm"] = "timm"

    def num_tokens(self, image_size: int) -> int:
        return self.tokens_per_image


@dataclass(frozen=True, slots=True)
class OnnxVisionConfig:
    """A tower that is an ONNX graph with an output `tokens` and perhaps `pooled`; the file lies in the checkpoint."""

    __pydantic_config__ = CLOSED

    dim: Count
    tokens_per_image: Count
    pooled_dim: Count  # equal to `dim` where the graph has no `pooled`: the mean of the tokens stands in
    num_heads: Count
    norm_eps: float = 1e-6
    kind: Literal["onnx"] = "onnx"

    def num_tokens(self, image_size: int) -> int:
        return self.tokens_per_image


VisionConfig = Annotated[
    VitConfig | HubVisionConfig | TimmVisionConfig | OnnxVisionConfig,
    Field(discriminator="kind"),
]


def _grid(image_size: int, patch_size: int) -> int:
    if image_size % patch_size:
        raise ValueError(f"{image_size} pixels are no whole number of {patch_size}-pixel patches")
    return int((image_size // patch_size) ** 2)

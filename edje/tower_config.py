"""Configurations of vision towers, one frozen class per kind.

Knows neither torch nor the libraries of third-party towers; `edje.towers.build` builds the towers. Every kind has
these fields or properties:

    dim          width of a patch token
    num_tokens   number of patch tokens of a square image
    pooled_dim   width of the pooled embedding
    num_heads    attention heads of the adapter; the number of the tower's heads if the tower has attention
    norm_eps     epsilon of the adapter's LayerNorms
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(gt=0)]

CLOSED = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class VitConfig:
    """The local tower, `edje.towers.vit`: SigLIP layout, square patches, no class token, attention pooling.

    `stem` is SigLIP's one large convolution (`patch`), or small convolutions with stride 2 to the same grid (`conv`),
    with which a small tower learns much faster from scratch.
    """

    __pydantic_config__ = CLOSED

    patch_size: Annotated[Count, Field(description="Side of a patch in pixels.")]
    dim: Annotated[Count, Field(description="Width of a patch token.")]
    num_layers: Annotated[Count, Field(description="Number of layers.")]
    num_heads: Annotated[Count, Field(description="Attention heads of a layer.")]
    hidden_dim: Annotated[Count, Field(description="Width of the MLP in a layer.")]
    norm_eps: Annotated[float, Field(description="Epsilon of the LayerNorms.")] = 1e-6
    stem: Annotated[
        Literal["patch", "conv"],
        Field(
            description="How patches are embedded: by one convolution, or by small convolutions with stride 2, with "
            "which a small tower learns faster."
        ),
    ] = "patch"
    kind: Annotated[Literal["vit"], Field(description="The kind of tower.")] = "vit"

    def __post_init__(self) -> None:
        if self.stem == "patch":
            return
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"stem 'conv' needs a patch_size that is a power of two, not {self.patch_size}")
        if self.dim % (self.patch_size // 2):
            raise ValueError(
                f"stem 'conv' doubles the channels up to dim: {self.dim} must be a multiple of patch_size / 2 = "
                f"{self.patch_size // 2}"
            )

    @property
    def pooled_dim(self) -> int:
        return self.dim

    def num_tokens(self, image_size: int) -> int:
        return _num_patches(image_size, self.patch_size)


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
    hidden_state: Literal["last", "penultimate"]  # "last" is the output of the tower's final LayerNorm
    kind: Literal["transformers"] = "transformers"

    @property
    def pooled_dim(self) -> int:
        return self.dim

    def num_tokens(self, image_size: int) -> int:
        return _num_patches(image_size, self.patch_size)


@dataclass(frozen=True, slots=True)
class TimmVisionConfig:
    """A tower of the timm library by model name: any model that returns a feature grid or a sequence of tokens."""

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
    """A tower that is an ONNX graph with an output `tokens` and optionally `pooled`; the checkpoint holds the file."""

    __pydantic_config__ = CLOSED

    dim: Count
    tokens_per_image: Count
    pooled_dim: Count  # equal to `dim` for a graph without `pooled`: the mean of the tokens is used
    num_heads: Count
    norm_eps: float = 1e-6
    kind: Literal["onnx"] = "onnx"

    def num_tokens(self, image_size: int) -> int:
        return self.tokens_per_image


VisionConfig = Annotated[
    VitConfig | HubVisionConfig | TimmVisionConfig | OnnxVisionConfig,
    Field(discriminator="kind"),
]


def _num_patches(image_size: int, patch_size: int) -> int:
    if image_size % patch_size:
        raise ValueError(f"an image size of {image_size} pixels is no multiple of the patch size {patch_size}")
    return int((image_size // patch_size) ** 2)

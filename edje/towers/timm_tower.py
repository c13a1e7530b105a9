"""Vision towers of the timm library: any model that returns a feature grid or a sequence of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from edje.optional import require_package
from edje.tower_config import TimmVisionConfig
from edje.towers.base import FrozenTower


class TimmTower(FrozenTower):
    """The library's model without its classifier."""

    def __init__(self, config: TimmVisionConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self._build = partial(library_model, config.model_name, image_size)
        self.model = self._build()

    def _rebuild(self) -> None:
        self.model = self._build()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, H, W) -> (B, S, D), (B, E)
        return self._checked(*patch_tokens(self.model, pixels))


def patch_tokens(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, H, W) -> (B, S, D), (B, E)
    """The model's features as patch tokens, and its classifier's input as the pooled embedding.

    A grid is flattened row by row; class and register tokens are left out.
    """
    features = model.forward_features(pixels)
    pooled = model.forward_head(features, pre_logits=True)
    if features.ndim == 3:
        return features[:, getattr(model, "num_prefix_tokens", 0) :], pooled
    has_channels_last = str(getattr(model, "output_fmt", "NCHW")) == "NHWC"
    return features.flatten(1, 2) if has_channels_last else features.flatten(2).transpose(1, 2), pooled


def library_model(model_name: str, image_size: int, *, is_pretrained: bool = False) -> nn.Module:
    """The named model for images of this size; with `is_pretrained` the library downloads the weights."""
    timm = require_package("timm", "train")
    model = timm.create_model(model_name, pretrained=is_pretrained, num_classes=0)
    if hasattr(model, "set_input_size") and image_size != model.pretrained_cfg["input_size"][-1]:
        model.set_input_size(img_size=image_size)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]

"""Vision towers of the transformers library (SigLIP, SigLIP 2, CLIP), built from their numbers alone.

The one module that knows how that library names things; the weights come from our own checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edje.optional import need
from edje.tower_config import HubVisionConfig
from edje.towers.base import BorrowedTower, TowerError

#: Our field, and what the library's vision configurations call it.
_FIELDS = {
    "patch_size": "patch_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "hidden_act": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
_CLASSES = {
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel"),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel"),
}


class HubTower(BorrowedTower):
    """The library's own module, read at the layer that the configuration names."""

    def __init__(self, config: HubVisionConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self._is_penultimate = config.hidden_state == "penultimate"
        has_class_token = config.architecture == "clip_vision_model"
        self._num_dropped = int(has_class_token and not config.keep_class_token)
        self._build = partial(_library_model, config, image_size)
        self.model = self._build()

    def _renew(self) -> None:
        self.model = self._build()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, H, W) -> (B, S, D), (B, D)
        seen = self.model(pixel_values=pixels, output_hidden_states=self._is_penultimate)
        hidden = seen.hidden_states[-2] if self._is_penultimate else seen.last_hidden_state
        return self._checked(hidden[:, self._num_dropped :], seen.pooler_output)


@dataclass(frozen=True, slots=True)
class PublishedTower:
    """What a folder of the hub holds of a vision tower."""

    config: HubVisionConfig
    image_size: int
    preprocessor: Mapping[str, Any]  # as the hub publishes it; empty where it does not
    weights: Mapping[str, Tensor] | None


def published_tower(name: str, *, is_pretrained: bool) -> PublishedTower:
    """Read a SigLIP, SigLIP 2 or CLIP model by its name on the hub or its local folder. Raises `TowerError`."""
    transformers = need("transformers", "train")
    try:
        whole = transformers.AutoConfig.from_pretrained(name)
        vision = getattr(whole, "vision_config", whole).to_dict()
        if vision["model_type"] not in _CLASSES:
            raise TowerError(f"{name} is a {vision['model_type']}; known are {' and '.join(_CLASSES)}")
        weights = None
        if is_pretrained:
            model_class = getattr(transformers, _CLASSES[vision["model_type"]][1])
            # Never a pickle, and the type that our own checkpoints keep.
            weights = model_class.from_pretrained(name, use_safetensors=True, dtype=torch.float32).state_dict()
    except (OSError, ValueError) as error:
        raise TowerError(
            f"{name} cannot be loaded: {str(error)[:300]}: where the hub cannot be reached, give a local folder with "
            "config.json, preprocessor_config.json and model.safetensors"
        ) from error
    try:
        preprocessor, _ = transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        preprocessor = {}
    return PublishedTower(_hub_vision_config(vision), int(vision["image_size"]), preprocessor, weights)


def _hub_vision_config(published: Mapping[str, Any]) -> HubVisionConfig:
    architecture = published["model_type"]
    fields = {ours: published[theirs] for ours, theirs in _FIELDS.items()}
    # What the paper reads: SigLIP's last hidden state, CLIP's last but one.
    hidden_state: Literal["last", "penultimate"] = "last" if architecture == "siglip_vision_model" else "penultimate"
    return HubVisionConfig(architecture=architecture, hidden_state=hidden_state, **fields)


def _library_model(config: HubVisionConfig, image_size: int) -> nn.Module:
    transformers = need("transformers", "train")
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[config.architecture])
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    model = model_class(config_class(image_size=image_size, **fields))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]

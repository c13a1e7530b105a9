"""Vision towers of the transformers library (SigLIP, SigLIP 2, CLIP), built from a configuration without downloads.

The one module that knows the library's names for towers; the weights come from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edje.optional import require_package
from edje.tower_config import HubVisionConfig
from edje.towers.base import FrozenTower, TowerError

#: Our field, and its name in the library's vision configurations.
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


class HubTower(FrozenTower):
    """The library's module; returns the hidden state that the configuration names, without CLIP's class token."""

    def __init__(self, config: HubVisionConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self._is_penultimate = config.hidden_state == "penultimate"
        self._num_class_tokens = int(config.architecture == "clip_vision_model")
        self._build = partial(_library_model, config, image_size)
        self.model = self._build()

    def _rebuild(self) -> None:
        self.model = self._build()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, H, W) -> (B, S, D), (B, D)
        output = self.model(pixel_values=pixels, output_hidden_states=self._is_penultimate)
        hidden = output.hidden_states[-2] if self._is_penultimate else output.last_hidden_state
        return self._checked(hidden[:, self._num_class_tokens :], output.pooler_output)


@dataclass(frozen=True, slots=True)
class PublishedTower:
    """A vision tower as published on the hub."""

    config: HubVisionConfig
    image_size: int
    preprocessor: Mapping[str, Any]  # the published preprocessor configuration; empty where there is none
    weights: Mapping[str, Tensor] | None


def read_published_tower(name: str, *, is_pretrained: bool) -> PublishedTower:
    """Read a SigLIP, SigLIP 2 or CLIP model by its name on the hub or its local folder.

    Weights are read if `is_pretrained`. Raises `TowerError`.
    """
    transformers = require_package("transformers", "train")
    try:
        whole = transformers.AutoConfig.from_pretrained(name)
        vision = getattr(whole, "vision_config", whole).to_dict()
        if vision["model_type"] not in _CLASSES:
            raise TowerError(f"{name} is a {vision['model_type']}; known are {' and '.join(_CLASSES)}")
        weights = None
        if is_pretrained:
            model_class = getattr(transformers, _CLASSES[vision["model_type"]][1])
            # Safetensors because a pickle can run code; float32 because our checkpoints store it.
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
    # As in the paper: the last hidden state of SigLIP, the one before the last of CLIP.
    hidden_state: Literal["last", "penultimate"] = "last" if architecture == "siglip_vision_model" else "penultimate"
    return HubVisionConfig(architecture=architecture, hidden_state=hidden_state, **fields)


def _library_model(config: HubVisionConfig, image_size: int) -> nn.Module:
    transformers = require_package("transformers", "train")
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[config.architecture])
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    model = model_class(config_class(image_size=image_size, **fields))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]

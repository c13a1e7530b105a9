"""Builds the vision tower of a configuration, of any kind."""

from __future__ import annotations

import torch
from torch import nn

from edje.tower_config import HubVisionConfig, OnnxVisionConfig, TimmVisionConfig, VisionConfig, VitConfig
from edje.towers.base import FrozenTower, TowerError
from edje.towers.hub_tower import HubTower
from edje.towers.onnx_tower import OnnxTower
from edje.towers.timm_tower import TimmTower
from edje.towers.vit import VisionTower


def build_tower(config: VisionConfig, image_size: int, graph: bytes | None = None) -> nn.Module:
    """The tower of this configuration for square images, uninitialised.

    Args:
        config: the tower.
        image_size: side of the images in pixels.
        graph: content of the ONNX file, for a tower of kind onnx.

    Raises `TowerError`, and `PackageMissing` where the tower's library is not installed.
    """
    if isinstance(config, VitConfig):
        return VisionTower(config, config.num_tokens(image_size))
    # On the CPU even under another default device: a third-party module has buffers that no checkpoint stores.
    with torch.device("cpu"):
        tower = _frozen_tower(config, image_size, graph)
    return tower.eval().requires_grad_(False)


def _frozen_tower(
    config: HubVisionConfig | TimmVisionConfig | OnnxVisionConfig, image_size: int, graph: bytes | None
) -> FrozenTower:
    if isinstance(config, HubVisionConfig):
        return HubTower(config, image_size)
    if isinstance(config, TimmVisionConfig):
        return TimmTower(config, image_size)
    if graph is None:
        raise TowerError("a tower of kind onnx needs the content of its graph: load the checkpoint that holds it")
    return OnnxTower(config, image_size, graph)

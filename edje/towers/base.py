"""Builds the vision tower that a configuration describes, from whichever library it comes.

Knows of a tower only what all have in common; each kind's own module knows its library, and is imported when asked for.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from edje.tower_config import HubVisionConfig, OnnxVisionConfig, TimmVisionConfig, VisionConfig, VitConfig
from edje.towers.vit import VisionTower


class TowerError(RuntimeError):
    """A tower cannot be built or does not give what its configuration promises; the message says what to do."""


class Tower(Protocol):
    """What the rest of the model relies on; every tower is an `nn.Module` besides."""

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels (B, 3, H, W) to patch tokens (B, S, D) and a pooled embedding (B, E)."""
        ...


class BorrowedTower(nn.Module):
    """A tower of another library: frozen, always in evaluation, and held to its configuration's promise.

    Drawing dropout or counting a batch's statistics in it would change what the stored tokens mean.
    """

    def __init__(self, config: VisionConfig, image_size: int) -> None:
        super().__init__()
        self.graph: bytes | None = None  # the ONNX file of a tower that is one
        self._kind = config.kind
        self._promised = (config.num_tokens(image_size), config.dim, config.pooled_dim)

    def train(self, mode: bool = True) -> BorrowedTower:
        return super().train(False)

    def draw(self, seed: int) -> None:
        """Untrained weights as the library itself draws them; the same seed, the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._renew()

    def _renew(self) -> None:
        """Build the library's module once more. A graph has its weights inside and keeps them."""

    def _checked(self, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        found = (*tokens.shape[1:], pooled.shape[-1])
        if found != self._promised:
            raise TowerError(
                f"the {self._kind} tower gives (tokens, width, pooled width) {found}, its configuration says "
                f"{self._promised}: describe the tower anew with edje.towers.sources"
            )
        return tokens, pooled


def build_tower(config: VisionConfig, image_size: int, graph: bytes | None = None) -> nn.Module:
    """The tower of this configuration for square images; `graph` is the ONNX file of a tower that is one.

    Raises `TowerError` where the library that brings the tower is not installed.
    """
    if isinstance(config, VitConfig):
        return VisionTower(config, config.num_tokens(image_size))
    # Even where weights are only to be counted: a foreign module has buffers that no checkpoint stores.
    with torch.device("cpu"):
        tower = _borrowed(config, image_size, graph)
    return tower.eval().requires_grad_(False)


def _borrowed(
    config: HubVisionConfig | TimmVisionConfig | OnnxVisionConfig, image_size: int, graph: bytes | None
) -> BorrowedTower:
    if isinstance(config, HubVisionConfig):
        from edje.towers.hub_tower import HubTower

        return HubTower(config, image_size)
    if isinstance(config, TimmVisionConfig):
        from edje.towers.timm_tower import GridTower

        return GridTower(config, image_size)
    from edje.towers.onnx_tower import GraphTower

    if graph is None:
        raise TowerError("a tower of kind onnx needs the content of its graph: load the checkpoint that holds it")
    return GraphTower(config, image_size, graph)


def graph_of(tower: nn.Module) -> bytes | None:
    """The ONNX file that a tower is, to be kept beside the weights; None for a tower of weights alone."""
    return tower.graph if isinstance(tower, BorrowedTower) else None


def input_dtype(tower: nn.Module) -> torch.dtype:
    """The type of pixels a tower takes: that of its weights, fp32 where torch holds none."""
    return next((parameter.dtype for parameter in tower.parameters()), torch.float32)

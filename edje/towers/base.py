"""The common parts of vision towers: their error, the base of frozen third-party towers, and helpers for any tower.

A tower is an `nn.Module` that maps normalised pixels (B, 3, H, W) to patch tokens (B, S, D) and a pooled embedding
(B, E). Knows no library; `edje.towers.build` knows all kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edje.tower_config import VisionConfig


class TowerError(RuntimeError):
    """A tower cannot be built, or its outputs do not match its configuration; the message gives the remedy."""


class FrozenTower(nn.Module):
    """A third-party tower; checks its output shapes against the configuration.

    Always in evaluation mode: dropout or batch statistics would change the stored tokens.
    """

    def __init__(self, config: VisionConfig, image_size: int) -> None:
        super().__init__()
        self.graph: bytes | None = None  # content of the ONNX file, for a tower of kind onnx
        self._kind = config.kind
        self._expected = (config.num_tokens(image_size), config.dim, config.pooled_dim)

    def train(self, mode: bool = True) -> FrozenTower:
        return super().train(False)

    def initialise(self, seed: int) -> None:
        """Draw untrained weights with the library's own initialisation; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._rebuild()

    def _rebuild(self) -> None:
        """Build the library's module again. The default does nothing: an ONNX graph contains its weights."""

    def _checked(self, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        found = (*tokens.shape[1:], pooled.shape[-1])
        if found != self._expected:
            raise TowerError(
                f"the {self._kind} tower returns (tokens, width, pooled width) {found}, its configuration says "
                f"{self._expected}: create the configuration again with edje.towers.sources"
            )
        return tokens, pooled


def onnx_graph(tower: nn.Module) -> bytes | None:
    """The ONNX file of a tower of kind onnx, to store beside the weights; None for every other tower."""
    return tower.graph if isinstance(tower, FrozenTower) else None


def input_dtype(module: nn.Module) -> torch.dtype:
    """The type of the module's weights and so of its input; float32 for a module without weights."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)

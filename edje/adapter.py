"""Adapters: from the tower's patch tokens to the few visual tokens that are stored, in the joint encoder's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje.config import AdapterConfig, VisionConfig
from edje.layers import CrossAttention, Mlp


class CompressionAdapter(nn.Module):
    """Learned queries attend to the patches.

    Keys and values are projected twice, by `key` and `value` and again inside the attention, and nothing is added
    around the attention: that is how the published weights were trained.
    """

    def __init__(self, config: AdapterConfig, vision: VisionConfig, out_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, config.num_tokens, vision.dim))
        self.key = nn.Linear(vision.dim, vision.dim)
        self.value = nn.Linear(vision.dim, vision.dim)
        self.attention = CrossAttention(vision.dim, vision.num_heads)
        self.norm = nn.LayerNorm(vision.dim, eps=vision.norm_eps)
        self.mlp = Mlp(vision.dim, config.hidden_dim)
        self.projection = nn.Linear(vision.dim, out_dim)

    def forward(self, patches: Tensor) -> Tensor:  # (B, S, D) -> (B, m, d)
        queries = self.query.expand(patches.shape[0], -1, -1)
        hidden = self.attention(queries, self.key(patches), self.value(patches))
        return self.projection(hidden + self.mlp(self.norm(hidden)))  # type: ignore[no-any-return]


class LocalAdapter(nn.Module):
    """Every patch by itself: the teacher's adapter, nine times as many tokens to store."""

    def __init__(self, config: AdapterConfig, vision: VisionConfig, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision.dim, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, out_dim)

    def forward(self, patches: Tensor) -> Tensor:  # (B, S, D) -> (B, S, d)
        return self.fc2(functional.gelu(self.fc1(patches)))  # type: ignore[no-any-return]


def build_adapter(config: AdapterConfig, vision: VisionConfig, out_dim: int) -> CompressionAdapter | LocalAdapter:
    """The adapter of this kind, uninitialised."""
    if config.kind == "local":
        return LocalAdapter(config, vision, out_dim)
    return CompressionAdapter(config, vision, out_dim)

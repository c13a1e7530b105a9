"""Adapters: map the tower's patch tokens to the visual tokens that are stored, in the joint encoder's width."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje.config import AdapterConfig, JointConfig
from edje.layers import CrossAttention, Mlp, SelfAttention, empty_embedding
from edje.tower_config import VisionConfig


class PatchPositions(nn.Module):
    """Adds a learned vector for each patch position."""

    def __init__(self, num_patches: int, dim: int) -> None:
        super().__init__()
        self.table = empty_embedding(num_patches, dim)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, S, d) -> (B, S, d)
        return hidden + self.table.weight

    def evenly_spaced(self, count: int) -> Tensor:
        """The vectors of `count` evenly spaced positions, (count, d)."""
        num_patches = self.table.num_embeddings
        return self.table.weight[torch.arange(count) * num_patches // count]


def patch_positions(config: AdapterConfig, num_patches: int, dim: int) -> nn.Module:
    """Position vectors if the configuration asks for them, else the identity."""
    return PatchPositions(num_patches, dim) if config.places else nn.Identity()


class CompressionAdapter(nn.Module):
    """One cross-attention layer from learned queries to the patches.

    As in the published weights, keys and values are projected twice (by `key` and `value`, and inside the attention),
    and the attention has no residual connection.
    """

    def __init__(self, config: AdapterConfig, vision: VisionConfig, num_patches: int, out_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, config.num_tokens, vision.dim))
        self.key = nn.Linear(vision.dim, vision.dim)
        self.value = nn.Linear(vision.dim, vision.dim)
        self.places = patch_positions(config, num_patches, vision.dim)
        self.attention = CrossAttention(vision.dim, vision.num_heads)
        self.norm = nn.LayerNorm(vision.dim, eps=vision.norm_eps)
        self.mlp = Mlp(vision.dim, config.hidden_dim)
        self.projection = nn.Linear(vision.dim, out_dim)

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        """The attentions from queries to patches."""
        return [self.attention]

    def forward(self, patches: Tensor) -> Tensor:  # (B, S, D) -> (B, m, d)
        queries = self.query.expand(patches.shape[0], -1, -1)
        hidden = self.attention(queries, self.places(self.key(patches)), self.places(self.value(patches)))
        return self.projection(hidden + self.mlp(self.norm(hidden)))  # type: ignore[no-any-return]


class LocalAdapter(nn.Module):
    """An MLP on each patch: the teacher's adapter, with as many tokens as patches."""

    def __init__(self, config: AdapterConfig, vision: VisionConfig, num_patches: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision.dim, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, out_dim)
        self.places = patch_positions(config, num_patches, out_dim)

    def forward(self, patches: Tensor) -> Tensor:  # (B, S, D) -> (B, S, d)
        return self.places(self.fc2(functional.gelu(self.fc1(patches))))  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """A post-norm decoder layer: self-attention among the queries, cross-attention to the patches, MLP."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, num_heads)
        self.attention_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.cross = CrossAttention(dim, num_heads)
        self.cross_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden_dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, hidden: Tensor, keys: Tensor, patches: Tensor) -> Tensor:  # (B, m, d), (B, S, d) x 2 -> (B, m, d)
        hidden = self.attention_norm(hidden + self.attention(hidden))
        hidden = self.cross_norm(hidden + self.cross(hidden, keys, patches))
        return self.mlp_norm(hidden + self.mlp(hidden))  # type: ignore[no-any-return]


class DecoderAdapter(nn.Module):
    """Decoder layers from learned queries to the patches, all in the joint encoder's width.

    With two layers, 16 tokens lose 0.2 points of R@1 (arXiv 2610.11850).
    """

    def __init__(self, config: AdapterConfig, vision: VisionConfig, num_patches: int, joint: JointConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, config.num_tokens, joint.dim))
        self.narrow = nn.Linear(vision.dim, joint.dim)
        self.norm = nn.LayerNorm(joint.dim, eps=joint.norm_eps)
        self.places = patch_positions(config, num_patches, joint.dim)
        self.layers = nn.ModuleList(
            DecoderBlock(joint.dim, joint.num_heads, config.hidden_dim, joint.norm_eps)
            for _ in range(config.num_layers)
        )

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        """The attentions from queries to patches."""
        return [cast(DecoderBlock, layer).cross for layer in self.layers]

    def forward(self, patches: Tensor) -> Tensor:  # (B, S, D) -> (B, m, d)
        patches = self.norm(self.narrow(patches))
        keys = self.places(patches)
        hidden = self.query.expand(patches.shape[0], -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, keys, patches)
        return hidden


Adapter = CompressionAdapter | LocalAdapter | DecoderAdapter


def build_adapter(config: AdapterConfig, vision: VisionConfig, num_patches: int, joint: JointConfig) -> Adapter:
    """The adapter of this configuration, uninitialised."""
    if config.kind == "local":
        return LocalAdapter(config, vision, num_patches, joint.dim)
    if config.kind == "decoder":
        return DecoderAdapter(config, vision, num_patches, joint)
    return CompressionAdapter(config, vision, num_patches, joint.dim)

"""The local vision tower: a ViT in SigLIP layout, trainable and exportable."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edje.layers import CrossAttention, Mlp, SelfAttention
from edje.tower_config import VitConfig

#: Groups of each group norm in the stem; fewer where they do not divide the number of channels.
_NORM_GROUPS = 8


class VisionBlock(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = SelfAttention(config.dim, config.num_heads)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.hidden_dim, approximate="tanh")

    def forward(self, hidden: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """Pools the patches by attention from one learned query."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.attention = CrossAttention(config.dim, config.num_heads)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.hidden_dim, approximate="tanh")

    def forward(self, patches: Tensor) -> Tensor:  # (B, S, D) -> (B, D)
        hidden = self.attention(self.probe.expand(patches.shape[0], -1, -1), patches, patches)
        return (hidden + self.mlp(self.norm(hidden)))[:, 0]  # type: ignore[no-any-return]


def conv_stem(config: VitConfig) -> nn.Sequential:  # (B, 3, H, W) -> (B, D, H / patch, W / patch)
    """Strided convolutions from pixels to the patch grid; each halves the image and doubles the channels.

    Ends in a 1 x 1 convolution. Group norms, because batch norms would make a token depend on the rest of the batch.
    """
    width = config.dim // (config.patch_size // 2)
    steps: list[nn.Module] = []
    num_channels = 3
    while width <= config.dim:
        steps += [
            nn.Conv2d(num_channels, width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.GroupNorm(math.gcd(width, _NORM_GROUPS), width),
            nn.GELU(),
        ]
        num_channels, width = width, 2 * width
    return nn.Sequential(*steps, nn.Conv2d(num_channels, config.dim, kernel_size=1))


class VisionTower(nn.Module):
    """Patch embedding with learned positions, pre-norm layers, a final norm and the attention pool."""

    def __init__(self, config: VitConfig, num_patches: int) -> None:
        super().__init__()
        self.patches = (
            conv_stem(config)
            if config.stem == "conv"
            else nn.Conv2d(3, config.dim, kernel_size=config.patch_size, stride=config.patch_size)
        )
        self.positions = nn.Parameter(torch.zeros(1, num_patches, config.dim))
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.pool = AttentionPool(config)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (B, 3, H, W) -> (B, S, D), (B, D)
        hidden = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        return hidden, self.pool(hidden)

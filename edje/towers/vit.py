"""Our own vision tower: a ViT in SigLIP layout. Normalised pixels in, patch tokens and a pooled embedding out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edje.layers import Attention, CrossAttention, Mlp
from edje.tower_config import VitConfig

#: Channels of the stem are normalised in this many groups, as far as their number divides.
_NORM_GROUPS = 8


class VisionBlock(nn.Module):
    """A layer that normalises before it mixes."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, config.num_heads)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.hidden_dim, approximate="tanh")

    def forward(self, hidden: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """One learned probe that looks at all patches."""

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
    """Convolutions that halve the image and double the channels down to the patch grid, then one map without a norm.

    Group norms, unlike batch norms, see one image at a time: in training as in use.
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
    """Patches with learned positions, layers, a last norm, and the pooling head."""

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

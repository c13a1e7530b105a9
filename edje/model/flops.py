"""Floating-point operations of a joint encoder per pair, per query and per image.

Two per multiply-add, matrix products only: norms, GELU and softmax add less than one percent.
"""

from __future__ import annotations

from dataclasses import dataclass

from edje.config import JointConfig


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs per pair, per query and per image. `per_image` is spent offline and excludes tower and adapter."""

    per_pair: int
    per_query: int
    per_image: int


def cost_of(config: JointConfig, num_text: int, num_visual: int) -> Cost:
    """FLOPs of serving, where the last layer computes only [CLS]; `num_text` includes the caption's [CLS] and [SEP]."""
    return Cost(
        per_pair=joint_flops(config, num_text, num_visual, cls_only_last_layer=True) + _head_flops(config),
        per_query=config.text_layers * _block_flops(config, num_text, num_text),
        per_image=config.visual_layers * _block_flops(config, num_visual, num_visual),
    )


def joint_flops(config: JointConfig, num_text: int, num_visual: int, *, cls_only_last_layer: bool = False) -> int:
    """FLOPs per pair of the fusion layers and the late interaction, without the head, as in the paper's figures."""
    num_read = num_text + num_visual + (0 if config.is_late_fusion else 1)  # `full` has a last [SEP]
    num_updated = num_text if config.kind == "minimal" else num_read
    total = config.num_layers * _block_flops(config, num_updated, num_read)
    if cls_only_last_layer and config.num_layers:
        total += _block_flops(config, 1, num_read) - _block_flops(config, num_updated, num_read)
    if config.match_dim:
        projection = config.dim * (num_text + num_visual)
        total += 2 * config.match_dim * (projection + num_text * num_visual)
    return total


def _block_flops(config: JointConfig, num_updated: int, num_read: int) -> int:
    """One layer: keys and values of every token that is read, all other products for the tokens that are updated."""
    d, f = config.dim, config.hidden_dim
    return 2 * 2 * d * d * num_read + 2 * (2 * d * d + 2 * d * f) * num_updated + 4 * d * num_updated * num_read


def _head_flops(config: JointConfig) -> int:
    """FLOPs of pooler and output layer; 0 without fusion layers."""
    return 2 * config.dim * (config.dim + 1) if config.num_layers > 0 else 0

"""What a joint encoder computes: floating-point operations per pair, per query and per image.

Two per multiply-add, matrix products only: norms, GELU and softmax add under one percent.
"""

from __future__ import annotations

from dataclasses import dataclass

from edje.config import JointConfig


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs by how often they are spent. Those of an image are spent offline, and leave tower and adapter out."""

    per_pair: int
    per_query: int
    per_image: int


def cost_of(config: JointConfig, num_text: int, num_visual: int) -> Cost:
    """What serving costs, only [CLS] computed in the last layer; `num_text` counts the caption's [CLS] and [SEP]."""
    return Cost(
        per_pair=joint_flops(config, num_text, num_visual, cls_only_last_layer=True) + _head(config),
        per_query=config.text_layers * _block(config, num_text, num_text),
        per_image=config.visual_layers * _block(config, num_visual, num_visual),
    )


def joint_flops(config: JointConfig, num_text: int, num_visual: int, *, cls_only_last_layer: bool = False) -> int:
    """FLOPs for one pair, of the layers after the meeting and of a late interaction where there is one.

    Without the head, as the paper's figures are.
    """
    num_read = num_text + num_visual + (0 if config.apart else 1)  # the paper's encoder reads a last [SEP] too
    num_updated = num_text if config.kind == "minimal" else num_read
    total = config.num_layers * _block(config, num_updated, num_read)
    if cls_only_last_layer and config.num_layers:
        total += _block(config, 1, num_read) - _block(config, num_updated, num_read)
    if config.match_dim:
        narrowed = config.dim * (num_text + num_visual)  # to the width in which tokens are compared
        total += 2 * config.match_dim * (narrowed + num_text * num_visual)
    return total


def _block(config: JointConfig, num_updated: int, num_read: int) -> int:
    """One layer: keys and values of everything that is read, the rest for what is updated."""
    d, f = config.dim, config.hidden_dim
    return 2 * 2 * d * d * num_read + 2 * (2 * d * d + 2 * d * f) * num_updated + 4 * d * num_updated * num_read


def _head(config: JointConfig) -> int:
    """Pooler and logit where there are layers to read [CLS] from, and what reads the first stage's score."""
    has_cls = config.num_layers > 0
    total = 2 * config.dim * (config.dim + 1) if has_cls else 0
    if config.first_stage is not None:
        total += 2 * config.first_stage.hidden_dim * (1 + (config.dim if has_cls else 1))
    return total

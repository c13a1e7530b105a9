"""Learning rates over a phase, and the parameter groups of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from edje.recipe import Part, Phase, RecipeError

#: Prefixes of the parameter names of each part of the training module.
PREFIXES: Mapping[Part, tuple[str, ...]] = {
    "vision": ("model.vision.",),
    "adapter": ("model.adapter.",),
    "text": (
        "model.joint.words.",
        "model.joint.positions.",
        "model.joint.types.",
        "model.joint.norm.",
        "model.joint.text_layers.",
    ),
    "visual": ("model.joint.visual_positions.", "model.joint.visual_norm.", "model.joint.visual_layers."),
    "meeting": (
        "model.joint.layers.",
        "model.joint.match.",
        "model.joint.head.",
        "model.joint.meeting_positions.",
        "heads.",
    ),
    "first_stage": ("first_stage.",),
}


def learning_rate(phase: Phase, step: int, steps_per_epoch: int, num_steps: int) -> float:
    """The rate of one step: linear warm-up, then a decay by a factor per epoch, or along a cosine to zero."""
    if step < phase.warmup_steps:
        share = (step + 1) / phase.warmup_steps
        return phase.start_learning_rate + share * (phase.learning_rate - phase.start_learning_rate)
    if phase.decay == "per_epoch":
        return phase.learning_rate * float(phase.decay_per_epoch ** (step // steps_per_epoch))
    progress = (step - phase.warmup_steps) / max(1, num_steps - phase.warmup_steps)
    return phase.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def part_of(name: str) -> Part:
    """The part of a parameter of the training module, by the parameter's name."""
    for part, prefixes in PREFIXES.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"the parameter {name} belongs to no part")


def parameter_groups(module: nn.Module, phase: Phase) -> list[dict[str, object]]:
    """Parameter groups for AdamW, by part and weight decay. Freezes every parameter that the phase does not train.

    Matrices have weight decay; biases, norms and scalars have none. Raises `RecipeError` if no parameter is trained.
    """
    groups: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        part = part_of(name)
        is_trained = part in phase.train and not name.endswith("word_weights")
        parameter.requires_grad_(is_trained)
        if is_trained:
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise RecipeError(
            f"phase {phase.name!r} trains {', '.join(phase.train)}, but this model has none of these parts"
        )
    return [
        {"params": parameters, "weight_decay": phase.weight_decay if decays else 0.0, "factor": phase.train[part]}
        for (part, decays), parameters in groups.items()
    ]

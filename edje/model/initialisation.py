"""Initial weights, the same for the same seed: of an untrained model, and of every module that training starts from."""

from __future__ import annotations

import torch
from torch import nn

from edje.model.adapter import Adapter, LocalAdapter, PatchPositions
from edje.model.edje import Edje
from edje.towers.base import FrozenTower

#: Standard deviation of embeddings and learned queries, as in BERT.
_TABLE_STD = 0.02
#: Standard deviation of position vectors that are added to states: the size of the states.
_ADDED_POSITION_STD = 1.0
_TABLES = ("words.weight", "positions.weight", "types.weight", "positions", "query", "probe")
_ADDED_POSITIONS = ("meeting_positions.weight", "places.table.weight")
_ZEROS = ("bias", "absent")
#: With a gain of 1, attention is nearly uniform and all pairs score within 0.1 of each other; with 1.5 scores spread
#: over about 1.
_UNTRAINED_GAIN, _UNTRAINED_TABLE_STD = 1.5, 1.0


@torch.no_grad()
def initialise(
    module: nn.Module, seed: int, *, gain: float = 1.0, table_std: float = _TABLE_STD, skip: str = ""
) -> None:
    """Draw the weights of a module.

    | parameter                        | value                                                          |
    |----------------------------------|----------------------------------------------------------------|
    | matrix, convolution              | normal, `gain` / sqrt(inputs): outputs have the inputs' size   |
    | embedding, learned query         | normal, `table_std`                                            |
    | position vector added to states  | normal, 1                                                      |
    | bias                             | 0                                                              |
    | other vector (norm, word weight) | 1                                                              |
    | scalar (temperature)             | unchanged                                                      |

    Parameters whose name starts with `skip` are left as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim == 0 or (skip and name.startswith(skip)):
            continue
        if name.endswith(_ZEROS):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            std = gain * parameter[0].numel() ** -0.5
            if name.endswith(_ADDED_POSITIONS):
                std = _ADDED_POSITION_STD
            elif name.endswith(_TABLES):
                std = table_std
            parameter.normal_(0.0, std, generator=generator)


def initialise_untrained(model: Edje, seed: int) -> None:
    """Draw weights with which scores differ between pairs, though they mean nothing: for tests and demonstrations."""
    if isinstance(model.vision, FrozenTower):
        model.vision.initialise(seed)
    initialise(model, seed, gain=_UNTRAINED_GAIN, table_std=_UNTRAINED_TABLE_STD, skip=_frozen_part(model))


@torch.no_grad()
def initialise_for_training(model: Edje, seed: int) -> None:
    """Draw weights to start training from; a third-party tower keeps its weights.

    The first logits are zero, or the first stage's scores where the head reads them, because the output layer is zero.
    """
    initialise(model, seed, skip=_frozen_part(model))
    start_queries_at_positions(model.adapter)
    if model.joint.head is not None:
        model.joint.head.out.weight.zero_()


@torch.no_grad()
def start_queries_at_positions(adapter: Adapter) -> None:
    """Start each learned query at the vector of one patch position, if the adapter has position vectors.

    The positions are spaced evenly, and queries are projected like keys, so that a query first attends to its
    position. Random queries attend to all patches alike: their tokens encode what an image shows, but not where.
    """
    if isinstance(adapter, LocalAdapter) or not isinstance(adapter.places, PatchPositions):
        return
    adapter.query.add_(adapter.places.evenly_spaced(adapter.query.shape[1]))
    for cross in adapter.cross_attentions:
        weight = cross.attention.in_proj_weight
        dim = weight.shape[1]
        weight[:dim] = weight[dim : 2 * dim]


def _frozen_part(model: Edje) -> str:
    return "vision." if isinstance(model.vision, FrozenTower) else ""

"""The samples of all devices together, for losses by contrast: whoever has more devices then has more negatives.

Gradients flow back to the device that a row came from. With one device everything is as it was. Every device must call
these in the same order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, distributed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        distributed.all_reduce(gradient)  # what every device's loss makes of every row
        first = distributed.get_rank() * ctx.num_rows
        return gradient[first : first + ctx.num_rows]


def gathered(rows: Tensor) -> Tensor:
    """(B, ...) of this device -> (G, ...) of all, in the order of their ranks; B is the same everywhere."""
    if not distributed.is_initialized():
        return rows
    return cast(Tensor, _Gather.apply(rows))


def gathered_texts(states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, d) and (B,) -> (G, T', d) and (G,): padded on the right to the longest text of all devices."""
    if not distributed.is_initialized():
        return states, lengths
    all_lengths = gathered(lengths)
    num_lacking = int(all_lengths.max()) - states.shape[1]
    padded = torch.nn.functional.pad(states, (0, 0, 0, num_lacking))  # or cut, if every text is shorter
    return gathered(padded), all_lengths

"""The matching head: from [CLS] to one logit, as in the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edje.config import JointConfig


class MatchingHead(nn.Module):
    """Pooler and output layer."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, 1)

    def forward(self, cls: Tensor) -> Tensor:  # (B, d) -> (B,)
        """Logits of pairs, from their [CLS] after the last layer."""
        cls = cls.to(self.pooler.weight.dtype)
        return self.out(torch.tanh(self.pooler(cls)))[:, 0]  # type: ignore[no-any-return]

"""The matching head: from [CLS] to one logit, and what else may speak in it.

With nothing but [CLS] it is the paper's head. The first stage's score is a variant (after VEDJE, arXiv 2610.11850):
a small network on the standardised scalar joins [CLS], and a straight path lets the head start from the first stage's
own order instead of having to find it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje.config import FirstStageConfig, JointConfig


class MatchingHead(nn.Module):
    """Pooler, logit, and the first stage's score where the configuration asks for it."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, 1)
        self.first_stage = None if config.first_stage is None else FirstStageInput(config.first_stage, config.dim)

    def forward(self, cls: Tensor, first_stage: Tensor | None) -> Tensor:  # (B, d), (B,) -> (B,)
        """`first_stage` is read only by a head that was built for it; None there means that no pair has a score."""
        cls = cls.to(self.pooler.weight.dtype)
        if self.first_stage is None:
            return self._logit(cls)
        if first_stage is None:
            first_stage = cls.new_full(cls.shape[:1], float("nan"))
        added, straight = self.first_stage(first_stage)
        return self._logit(cls + added) + straight  # type: ignore[no-any-return]

    def _logit(self, cls: Tensor) -> Tensor:
        return self.out(torch.tanh(self.pooler(cls)))[:, 0]  # type: ignore[no-any-return]


class FirstStageInput(nn.Module):
    """A first-stage score as something to add to [CLS] and to the logit; a missing one (NaN) is a state of its own."""

    def __init__(self, config: FirstStageConfig, dim: int) -> None:
        super().__init__()
        self.mean, self.std = config.mean, config.std
        self.fc1 = nn.Linear(1, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, dim)
        self.absent = nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, score: Tensor) -> tuple[Tensor, Tensor]:  # (B,) -> (B, d), (B,)
        known = torch.isfinite(score)
        standard = torch.where(known, (score - self.mean) / self.std, 0.0).to(self.gain.dtype)
        read = self.fc2(functional.gelu(self.fc1(standard[:, None])))
        added = torch.where(known[:, None], read, self.absent)
        return added, self.gain * standard

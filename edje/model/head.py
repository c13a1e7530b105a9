"""The matching head: from [CLS] to one logit, optionally with the first stage's score.

On [CLS] alone it is the paper's head. The first-stage score is a variant (VEDJE, arXiv 2610.11850): a small network on
the standardised score adds to [CLS], and the score itself adds to the logit, so that training starts from the first
stage's order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje.config import FirstStageScoreConfig, JointConfig


class MatchingHead(nn.Module):
    """Pooler, output layer, and the input of the first-stage score where the configuration asks for it."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, 1)
        self.first_stage = None if config.first_stage is None else FirstStageScoreInput(config.first_stage, config.dim)

    def forward(self, cls: Tensor, first_stage: Tensor | None) -> Tensor:  # (B, d), (B,) -> (B,)
        """Logits. `first_stage` None means that no pair has a score; a head without score input ignores it."""
        cls = cls.to(self.pooler.weight.dtype)
        if self.first_stage is None:
            return self._logit(cls)
        if first_stage is None:
            first_stage = cls.new_full(cls.shape[:1], float("nan"))
        to_cls, to_logit = self.first_stage(first_stage)
        return self._logit(cls + to_cls) + to_logit  # type: ignore[no-any-return]

    def _logit(self, cls: Tensor) -> Tensor:
        return self.out(torch.tanh(self.pooler(cls)))[:, 0]  # type: ignore[no-any-return]


class FirstStageScoreInput(nn.Module):
    """Maps a first-stage score to summands of [CLS] and of the logit; a missing score (NaN) has a learned vector."""

    def __init__(self, config: FirstStageScoreConfig, dim: int) -> None:
        super().__init__()
        self.mean, self.std = config.mean, config.std
        self.fc1 = nn.Linear(1, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, dim)
        self.absent = nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, score: Tensor) -> tuple[Tensor, Tensor]:  # (B,) -> (B, d), (B,)
        is_known = torch.isfinite(score)
        standard = torch.where(is_known, (score - self.mean) / self.std, 0.0).to(self.gain.dtype)
        hidden = self.fc2(functional.gelu(self.fc1(standard[:, None])))
        return torch.where(is_known[:, None], hidden, self.absent), self.gain * standard

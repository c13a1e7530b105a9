"""Cheap repeatable chance: many small draws from one numpy stream.

A scalar draw from numpy costs microseconds and a caption makes dozens; uniform numbers are drawn by the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BLOCK = 256


class Dice:
    """Draws that depend on the key alone."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.default_rng(key)
        self._uniform: list[float] = []

    def uniform(self) -> float:
        """From 0 up to, not including, 1."""
        if not self._uniform:
            self._uniform = self._generator.random(_BLOCK).tolist()
        return self._uniform.pop()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.uniform() * len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of them in random order."""
        rest = list(items)
        return [rest.pop(int(self.uniform() * len(rest))) for _ in items]

"""Many small random draws from one numpy stream, repeatable by key.

A scalar draw from numpy takes microseconds and a caption needs dozens, so uniform numbers are drawn in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BLOCK = 256


class RandomDraws:
    """Random draws that depend on the key alone."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.default_rng(key)
        self._uniform: list[float] = []

    def uniform(self) -> float:
        """A number from 0 up to, not including, 1."""
        if not self._uniform:
            self._uniform = self._generator.random(_BLOCK).tolist()
        return self._uniform.pop()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, all with the same probability."""
        return choices[int(self.uniform() * len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order."""
        rest = list(items)
        return [rest.pop(int(self.uniform() * len(rest))) for _ in items]

"""Turns the logits of a request's candidates into its ranking.

Pure: no clock, no wire format. Ties keep the candidates' order; a logit that is not finite is an error, never a rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class NotFinite(ValueError):
    """The engine gave a logit that is NaN or infinite."""


def rank(
    logits: NDArray[np.float32], scored: NDArray[np.bool_] | None, top_n: int | None
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Order the scored candidates best first.

    `logits` `(n,)`; `scored` `(n,)` says which of them count (None: all). Returns the candidates' numbers and their
    relevance scores (the sigmoid of the logit), cut to `top_n`. Raises `NotFinite`.
    """
    numbers = np.arange(len(logits)) if scored is None else np.flatnonzero(scored)
    chosen = logits[numbers]
    if not np.isfinite(chosen).all():
        bad = int(numbers[np.flatnonzero(~np.isfinite(chosen))[0]])
        raise NotFinite(f"the engine scored candidate {bad} as {logits[bad]}")
    best = np.argsort(-chosen, kind="stable")[:top_n]
    return numbers[best], relevance(chosen[best])


def relevance(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The sigmoid, in the form that does not overflow for large negative logits."""
    exact = logits.astype(np.float64)
    small = np.exp(-np.abs(exact))
    return np.where(exact >= 0, 1.0 / (1.0 + small), small / (1.0 + small))

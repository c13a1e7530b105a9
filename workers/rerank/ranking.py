"""Ranks the candidates of one request by their logits.

Pure: no clock, no wire format. Ties keep the order of the candidates; a logit that is not finite is an error.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edje.calibration import DirectionCalibration, log_odds, sigmoid


class NotFinite(ValueError):
    """The engine returned a logit that is NaN or infinite."""


class Ranking(NamedTuple):
    """The ranked candidates, best first."""

    order: NDArray[np.intp]  # positions in the request
    relevance: NDArray[np.float64]  # probabilities that image and text fit
    logits: NDArray[np.float32]


def rank(
    logits: NDArray[np.float32],
    scored: NDArray[np.bool_] | None,
    top_n: int | None,
    *,
    first_stage: NDArray[np.float32] | None = None,
    calibration: DirectionCalibration | None = None,
) -> Ranking:
    """Order the scored candidates by their log-odds and return the first `top_n`.

    All arrays are `(candidates,)`. `scored` marks the candidates that have a logit (None: all); `first_stage` holds
    standardised scores, which a calibration may add to the logits. Without a calibration the log-odds are the logits.
    Raises `NotFinite`.
    """
    positions = np.arange(len(logits)) if scored is None else np.flatnonzero(scored)
    chosen = logits[positions]
    if not np.isfinite(chosen).all():
        bad = int(positions[np.flatnonzero(~np.isfinite(chosen))[0]])
        raise NotFinite(f"the engine returned the logit {logits[bad]} for candidate {bad}")
    first = np.zeros(len(chosen), np.float32) if first_stage is None else first_stage[positions]
    odds = log_odds(chosen, first, calibration)
    best = np.argsort(-odds, kind="stable")[:top_n]
    return Ranking(positions[best], sigmoid(odds[best]), chosen[best])

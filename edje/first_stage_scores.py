"""Standardised first-stage scores: converts scores on any scale to one number per candidate that models can read.

A pure function of one request's scores. Training, evaluation and the service call it; it knows neither the model nor
the wire format.

Only the order of the scores counts, so cosines, cosines times 100, BM25, reciprocal ranks and any other strictly
increasing function of a score give the same result. A distance decreases with relevance: negate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: Faults of a request's scores: they do not order all candidates, or they probably have the wrong sign.
ScoreFault = Literal["missing", "incomplete", "equal", "ascending"]

#: The effect of each fault on the ranking, for a person who reads a reply or a report.
FAULT_MESSAGES: dict[ScoreFault, str] = {
    "missing": "no candidate has a first-stage score: the given order of the candidates counts as the first stage's",
    "incomplete": (
        "some candidates have no finite first-stage score: the given order of the candidates counts as the first "
        "stage's, for all of them"
    ),
    "equal": ("all first-stage scores are equal: the given order of the candidates counts as the first stage's"),
    "ascending": (
        "the first-stage scores rise from the first candidate to the last: higher means better, so distances must be "
        "negated"
    ),
}

#: Two candidates are in ascending order half of the time; three by chance in one request of six.
_FEWEST_ASCENDING = 3


@dataclass(frozen=True, slots=True)
class StandardScores:
    """The standardised scores of one request's candidates."""

    values: NDArray[np.float32]  # (candidates,): minus the logarithm of the rank, 0 for the best
    fault: ScoreFault | None  # None: the scores gave the order


def standardise(scores: Sequence[float | None] | NDArray[np.floating]) -> StandardScores:
    """Standardise one request's scores, `(candidates,)`; None and NaN are missing scores.

    A candidate of rank r among the request's scores, the best being 1, gets -ln(r). Ties keep the given order. If any
    score is missing or infinite, the given order counts for all candidates, as if each were better than the next.
    """
    given = np.array(scores, np.float64)
    fault = _fault_of(given)
    positions = np.arange(len(given))
    if fault not in ("missing", "incomplete"):
        positions[np.argsort(-given, kind="stable")] = np.arange(len(given))
    return StandardScores(of_ranks(positions + 1), fault)


def of_ranks(ranks: NDArray[np.integer]) -> NDArray[np.float32]:
    """The standardised scores of candidates with these ranks; the best rank is 1."""
    # Adding nothing turns the negative zero of rank 1 into a plain one.
    values: NDArray[np.float32] = (-np.log(ranks) + 0.0).astype(np.float32)
    return values


def _fault_of(given: NDArray[np.float64]) -> ScoreFault | None:
    is_finite = np.isfinite(given)
    if len(given) == 0:
        return None
    if not is_finite.any():
        return "missing"
    if not is_finite.all():
        return "incomplete"
    if len(given) > 1 and (given == given[0]).all():
        return "equal"
    if len(given) >= _FEWEST_ASCENDING and (np.diff(given) > 0).all():
        return "ascending"
    return None

"""How well two sets of logits agree: in value, in who comes first, and in rank. Knows numbers only."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from trt.contract import EngineError

Share = Annotated[float, Field(ge=0, le=1)]


class ParityFailed(EngineError):
    """Two engines do not agree, or one of them gives no numbers; the message says where."""


class Thresholds(BaseModel):
    """What is asked of an agreement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top1: Share  # of the queries whose best candidate is the same
    tau: Annotated[float, Field(ge=-1, le=1)]  # Kendall's tau, mean over queries
    max_error: Annotated[float, Field(gt=0)]  # of any logit, in units of the logits' own spread


#: By the engine's precision, against float32. Ranks decide; the error is bounded to find what ranks hide, and loosely,
#: because a tower's last bit can move a stored value by a whole step of its storage type.
THRESHOLDS = {
    "fp32": Thresholds(top1=0.99, tau=0.999, max_error=0.02),
    "fp16": Thresholds(top1=0.95, tau=0.98, max_error=0.2),
    "bf16": Thresholds(top1=0.9, tau=0.9, max_error=0.4),
}


class Agreement(BaseModel):
    """What came of a comparison; the places name the query and the candidate of its list, both from 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_queries: int
    num_candidates: int  # of each query
    max_error: float  # in units of the spread
    max_error_at: tuple[int, int]  # query, candidate
    logit_spread: float  # standard deviation of the reference's logits
    top1: float
    top1_missed: tuple[int, ...]  # queries, the first few
    tau: float
    tau_lowest: float
    tau_lowest_at: int  # query


#: Queries named in an agreement.
_MAX_NAMED = 10


def compare(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> Agreement:
    """Compare `(Q, K)` logits of Q queries over K candidates each with the same pairs' reference.

    Candidates whose reference logits tie may come in either order. Raises `ParityFailed` where a logit is not finite,
    or where the reference holds all pairs equal, and `ValueError` for other shapes or fewer than two candidates.
    """
    if reference.shape != logits.shape or reference.ndim != 2 or reference.shape[1] < 2 or not len(reference):
        raise ValueError(f"logits are {logits.shape}, the reference's {reference.shape}; expected (Q, K) with K > 1")
    for name, each in (("reference", reference), ("engine", logits)):
        if not np.isfinite(each).all():
            query, candidate = np.argwhere(~np.isfinite(each))[0]
            raise ParityFailed(f"the {name}'s logit of query {query} with candidate {candidate} is not finite")
    spread = float(reference.std(dtype=np.float64))
    if spread == 0:
        raise ParityFailed("the reference gives every pair the same logit: nothing can be compared")
    errors = np.abs(reference.astype(np.float64) - logits) / spread
    query, candidate = np.unravel_index(int(errors.argmax()), errors.shape)
    rows = np.arange(len(reference))
    missed = reference[rows, logits.argmax(axis=1)] < reference.max(axis=1)
    taus = np.array([kendall_tau(*each) for each in zip(reference, logits, strict=True)])
    return Agreement(
        num_queries=reference.shape[0],
        num_candidates=reference.shape[1],
        max_error=float(errors.max()),
        max_error_at=(int(query), int(candidate)),
        logit_spread=spread,
        top1=float(1 - missed.mean()),
        top1_missed=tuple(np.flatnonzero(missed)[:_MAX_NAMED].tolist()),
        tau=float(taus.mean()),
        tau_lowest=float(taus.min()),
        tau_lowest_at=int(taus.argmin()),
    )


def kendall_tau(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Kendall's tau-b of two rankings; 1 where both hold all candidates equal, 0 where only one does."""
    above = np.triu_indices(len(one), k=1)
    first, second = (np.sign(each[above[0]] - each[above[1]]) for each in (one, other))
    untied = np.count_nonzero(first), np.count_nonzero(second)
    if not all(untied):
        return float(not any(untied))
    return float((first * second).sum() / np.sqrt(float(untied[0]) * untied[1]))


def shortfalls(agreement: Agreement, thresholds: Thresholds) -> list[str]:
    """A sentence for each threshold that was missed, with the place to look at."""
    found = []
    if agreement.top1 < thresholds.top1:
        named = ", ".join(map(str, agreement.top1_missed))
        found.append(
            f"{agreement.top1:.4f} of {agreement.num_queries} queries have the same best candidate, "
            f"asked for are {thresholds.top1}: look at queries {named}"
        )
    if agreement.tau < thresholds.tau:
        found.append(
            f"Kendall's tau is {agreement.tau:.4f} on average, asked for is {thresholds.tau}: "
            f"it is lowest ({agreement.tau_lowest:.4f}) in query {agreement.tau_lowest_at}"
        )
    if agreement.max_error > thresholds.max_error:
        query, candidate = agreement.max_error_at
        found.append(
            f"a logit is off by {agreement.max_error:.4f} of the logits' spread, allowed is {thresholds.max_error}: "
            f"query {query} with candidate {candidate}"
        )
    return found

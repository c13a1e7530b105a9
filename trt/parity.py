"""Measures how well two sets of logits agree: in value, in the best candidate and in rank. Knows numbers only."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from trt.contract import EngineError

Share = Annotated[float, Field(ge=0, le=1)]


class ParityFailed(EngineError):
    """Two engines do not agree, or a logit is not finite; the message names the query and the candidate."""


class Thresholds(BaseModel):
    """Required agreement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top1: Share  # lowest share of queries with the same best candidate
    tau: Annotated[float, Field(ge=-1, le=1)]  # lowest Kendall's tau, mean over queries
    max_error: Annotated[
        float, Field(gt=0)
    ]  # largest error of a logit, in standard deviations of the reference's logits


#: By the engine's precision, compared with float32. Ranks matter most. The error limit finds faults that ranks hide; it
#: is loose, because a tower's last bit can move a stored value by a whole step of its storage type.
THRESHOLDS = {
    "fp32": Thresholds(top1=0.99, tau=0.999, max_error=0.02),
    "fp16": Thresholds(top1=0.95, tau=0.98, max_error=0.2),
    "bf16": Thresholds(top1=0.9, tau=0.9, max_error=0.4),
}


class Agreement(BaseModel):
    """Result of a comparison. Queries, and candidates within a query, are numbered from 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_queries: int
    num_candidates: int  # for each query
    max_error: float  # in units of `logit_spread`
    max_error_at: tuple[int, int]  # query, candidate
    logit_spread: float  # standard deviation of the reference's logits
    top1: float
    top1_missed: tuple[int, ...]  # the first few queries with another best candidate
    tau: float
    tau_lowest: float
    tau_lowest_at: int  # query


#: Largest number of queries in `top1_missed`.
_MAX_NAMED = 10


def compare(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> Agreement:
    """Compare the `(Q, K)` logits of Q queries with K candidates each with the reference logits of the same pairs.

    Candidates with equal reference logits may come in either order. Raises `ParityFailed` if a logit is not finite or
    all reference logits are equal, and `ValueError` for different shapes or fewer than two candidates.
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
    """Return Kendall's tau-b of two rankings; 1 if both rank all candidates equal, 0 if only one does."""
    above = np.triu_indices(len(one), k=1)
    first, second = (np.sign(each[above[0]] - each[above[1]]) for each in (one, other))
    untied = np.count_nonzero(first), np.count_nonzero(second)
    if not all(untied):
        return float(not any(untied))
    return float((first * second).sum() / np.sqrt(float(untied[0]) * untied[1]))


def shortfalls(agreement: Agreement, thresholds: Thresholds) -> list[str]:
    """Return a sentence for each threshold that was missed, which names the queries to look at."""
    found = []
    if agreement.top1 < thresholds.top1:
        named = ", ".join(map(str, agreement.top1_missed))
        found.append(
            f"{agreement.top1:.4f} of {agreement.num_queries} queries have the same best candidate, "
            f"required is {thresholds.top1}: look at queries {named}"
        )
    if agreement.tau < thresholds.tau:
        found.append(
            f"Kendall's tau is {agreement.tau:.4f} on average, required is {thresholds.tau}: "
            f"it is lowest ({agreement.tau_lowest:.4f}) in query {agreement.tau_lowest_at}"
        )
    if agreement.max_error > thresholds.max_error:
        query, candidate = agreement.max_error_at
        found.append(
            f"a logit differs by {agreement.max_error:.4f} standard deviations of the logits, allowed is "
            f"{thresholds.max_error}: query {query} with candidate {candidate}"
        )
    return found

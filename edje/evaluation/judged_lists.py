"""Evaluates reranking of fixed candidate lists: a first stage of the user's, with its scores and labels.

Only the given candidates are ranked, as in INQUIRE-Rerank (arXiv 2411.02537). Takes log-odds, or rankings that a
service returned; knows no model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from edje.calibration import Calibration, Direction
from edje.data.candidate_lists import CandidateList
from edje.evaluation.bootstrap import Interval
from edje.evaluation.comparison import MetricRow, compare_columns
from edje.evaluation.errors import TaskInvalid
from edje.evaluation.report import Section, calibration_fact, changes
from edje.first_stage_scores import ScoreFault, standardise

CUTOFFS = (1, 5, 10)
METRICS = ("AP", "nDCG@10", "MRR", *(f"R@{cutoff}" for cutoff in CUTOFFS))


@dataclass(frozen=True, slots=True)
class ListsResult:
    """All lists of one direction. The metrics are those of lists with a positive; no order changes the others."""

    direction: Direction
    num_lists: int
    num_unjudged: int  # lists without any label
    num_without_positive: int  # lists with labels, all of them 0
    first_changed: float  # share of all lists whose first candidate is another one after reranking
    faults: dict[ScoreFault, int]  # number of lists by the fault of their first-stage scores
    rows: tuple[MetricRow, ...]  # empty if no list has a positive
    better: Interval | None  # share of lists whose average precision rises
    worse: Interval | None

    def section(self) -> Section:
        """The result as a table."""
        num_measured = self.num_lists - self.num_unjudged - self.num_without_positive
        remarks = []
        if self.better is not None and self.worse is not None:
            remarks.append(changes(self.better, self.worse))
        remarks.append(f"another first candidate in {100 * self.first_changed:.1f} % of the lists")
        if self.num_unjudged:
            remarks.append(f"{self.num_unjudged:,} lists have no label and are not measured")
        if self.num_without_positive:
            remarks.append(f"{self.num_without_positive:,} lists have no candidate with a label above 0")
        if self.faults:
            listed = ", ".join(f"{fault} in {count:,}" for fault, count in sorted(self.faults.items()))
            remarks.append(f"first-stage scores: {listed} lists")
        title = f"{self.direction}, fixed candidates: {num_measured:,} of {self.num_lists:,} lists measured"
        return Section(title, self.rows, tuple(remarks))


@dataclass(frozen=True, slots=True)
class ListsReport:
    """The evaluation of a file of candidate lists."""

    ranked_by: str  # a checkpoint or the service, with the model digest
    through_service: bool
    calibration: Calibration | None
    lists: str
    num_resamples: int
    seed: int
    results: tuple[ListsResult, ...]

    def facts(self) -> Sequence[str]:
        """Model, data and settings, in a few words each."""
        interval = f"95 % intervals of {self.num_resamples:,} resamples over queries"
        calibrated = () if self.through_service else (calibration_fact(self.calibration),)
        return (self.ranked_by, *calibrated, self.lists, interval)

    def sections(self) -> Sequence[Section]:
        """A section per direction."""
        return [result.section() for result in self.results]

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)


def evaluate_lists(
    lists: Sequence[CandidateList],
    orders: Sequence[NDArray[np.integer]],
    *,
    num_resamples: int,
    seed: int,
) -> tuple[ListsResult, ...]:
    """Compare each list's given order with its order after reranking; a result per direction that occurs.

    The order before is that of the first-stage scores, or the given order where they give none. `orders` holds for each
    list its candidates' positions, best first. Raises `TaskInvalid` for an order that is not a permutation.
    """
    results = []
    directions: tuple[Direction, ...] = ("text-to-image", "image-to-text")
    for direction in directions:
        chosen = [number for number, one in enumerate(lists) if one.direction == direction]
        if chosen:
            some = [lists[number] for number in chosen]
            results.append(_result(direction, some, [orders[number] for number in chosen], num_resamples, seed))
    return tuple(results)


def _result(
    direction: Direction,
    lists: Sequence[CandidateList],
    orders: Sequence[NDArray[np.integer]],
    num_resamples: int,
    seed: int,
) -> ListsResult:
    faults: Counter[ScoreFault] = Counter()
    before, after, queries = [], [], []
    num_unjudged = num_without_positive = num_changed = 0
    for one, order in zip(lists, orders, strict=True):
        if sorted(order) != list(range(len(one.candidates))):
            raise TaskInvalid(f"line {one.line}: the ranking is not an order of the {len(one.candidates)} candidates")
        standard = standardise([candidate.score for candidate in one.candidates])
        if standard.fault is not None:
            faults[standard.fault] += 1
        given = np.argsort(-standard.values, kind="stable")
        num_changed += given[0] != order[0]
        labels = np.array([candidate.label or 0.0 for candidate in one.candidates])
        if all(candidate.label is None for candidate in one.candidates):
            num_unjudged += 1
        elif not labels.any():
            num_without_positive += 1
        else:
            before.append(metrics_of(labels[given]))
            after.append(metrics_of(labels[order]))
            queries.append(one.query)
    rows: tuple[MetricRow, ...] = ()
    better = worse = None
    if queries:
        first, second = np.stack(before), np.stack(after)
        rows, better, worse = compare_columns(
            METRICS,
            first,
            second,
            np.sign(second[:, 0] - first[:, 0]).astype(np.int64),
            np.unique(queries, return_inverse=True)[1],
            num_resamples=num_resamples,
            seed=seed,
        )
    return ListsResult(
        direction,
        len(lists),
        num_unjudged,
        num_without_positive,
        float(num_changed / len(lists)),
        dict(faults),
        rows,
        better,
        worse,
    )


def metrics_of(labels: NDArray[np.float64]) -> NDArray[np.float64]:
    """`METRICS` of one ranking, from its `(candidates,)` labels, best candidate first, one of them above 0.

    A label above 0 is a positive; the gain of nDCG is the label. R@k is 1 where any positive is among the first k.
    """
    ranks = np.flatnonzero(labels > 0)
    precision = (np.arange(len(ranks)) + 1) / (ranks + 1)
    discounts = 1.0 / np.log2(np.arange(2, 12))
    gained = (labels[:10] * discounts[: len(labels)]).sum()
    best = (np.sort(labels)[::-1][:10] * discounts[: len(labels)]).sum()
    recalls = [float(ranks[0] < cutoff) for cutoff in CUTOFFS]
    return np.array([precision.mean(), gained / best, 1.0 / (ranks[0] + 1), *recalls])

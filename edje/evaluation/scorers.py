"""Scorers by name, as written on the command line.

    torch             the checkpoint's joint encoder
    maxsim            its late interaction alone, if it has one
    cascade:BUDGET    maxsim over all k candidates, then torch over the best BUDGET of them
    MODULE:FACTORY    the result of `FACTORY(split)`: an engine, a graph, a table

A factory takes the encoded split (`edje.evaluation.encoded_split`). Its scorer takes (caption, image) pairs in both
directions of retrieval and returns the model's logits. Like those of `torch` they become log-odds by the checkpoint's
calibration, as in the service.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edje.calibration import Direction, DirectionCalibration, log_odds
from edje.evaluation.cascade import Cascade
from edje.evaluation.cost import ScorerCost, cascade_cost
from edje.evaluation.errors import ScorerUnknown
from edje.evaluation.protocol import Scorer, swapped
from edje.first_stage_scores import of_ranks

CHEAP, FULL = "maxsim", "torch"
_CASCADE = re.compile(r"cascade:(\d+)", re.ASCII)
_DOTTED = re.compile(r"(?!cascade:)[^\W\d][\w.]*:[^\W\d]\w*")


class HasScorers(Protocol):
    """The part of an encoded split that this module reads: makers of scorers of (caption, image) pairs, by name."""

    @property
    def scorers(self) -> Mapping[str, Callable[[], Scorer]]: ...

    @property
    def costs(self) -> Mapping[str, ScorerCost]: ...


def check_scorer_name(name: str) -> None:
    """Raise `ScorerUnknown` for a name that cannot be a scorer of any split."""
    if name not in (CHEAP, FULL) and not _CASCADE.fullmatch(name) and not _DOTTED.fullmatch(name):
        raise ScorerUnknown(
            f"unknown scorer {name!r}: choose {FULL}, {CHEAP}, cascade:BUDGET with a number of candidates, "
            "or package.module:factory"
        )


def scores_pairs_independently(name: str) -> bool:
    """Whether a pair's score is known not to depend on k, so that one scoring serves every k."""
    return name in (CHEAP, FULL)


def returns_log_odds(name: str) -> bool:
    """Whether the scores of this scorer are the model's log-odds, and their sigmoid a probability."""
    return name != CHEAP and not _CASCADE.fullmatch(name)


@dataclass(frozen=True, slots=True)
class CalibratedScorer:
    """A scorer that turns another one's logits into log-odds.

    `ranks` returns the ranks of (query, candidate) pairs in the first stage's order, from 1.
    """

    logits: Scorer
    constants: DirectionCalibration | None
    ranks: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]

    def __call__(self, query_index: NDArray[np.int64], candidate_index: NDArray[np.int64], /) -> NDArray[np.float32]:
        logits = self.logits(query_index, candidate_index)
        if self.constants is None:
            return logits
        first_stage = of_ranks(self.ranks(query_index, candidate_index))
        return log_odds(np.asarray(logits), first_stage, self.constants).astype(np.float32)


def make_scorer(
    name: str, split: HasScorers, direction: Direction, calibrated: Callable[[Scorer], Scorer] = lambda logits: logits
) -> Scorer:
    """The scorer of this name for (query, candidate) pairs of this direction. Raises `ScorerUnknown`.

    `calibrated` turns a scorer of logits of such pairs into one of log-odds; by default logits stay as they are.
    """
    check_scorer_name(name)

    def directed(scorer: Scorer) -> Scorer:
        return scorer if direction == "text-to-image" else swapped(scorer)

    if cascade := _CASCADE.fullmatch(name):
        cheap, full = directed(_from_split(CHEAP, split)), directed(_from_split(FULL, split))
        return Cascade(cheap, calibrated(full), int(cascade[1]))
    if name == CHEAP:
        return directed(_from_split(name, split))
    return calibrated(directed(_from_split(name, split) if name == FULL else _from_factory(name, split)))


def cost_of_scorer(name: str, split: HasScorers, k: int) -> ScorerCost | None:
    """The cost of a scorer where a query has k candidates; None if it is unknown."""
    if cascade := _CASCADE.fullmatch(name):
        cheap, full = split.costs.get(CHEAP), split.costs.get(FULL)
        return (
            None if cheap is None or full is None else cascade_cost(cheap, full, int(cascade[1]), k, shared_query=True)
        )
    return split.costs.get(name)


def _from_split(name: str, split: HasScorers) -> Scorer:
    if name not in split.scorers:
        raise ScorerUnknown(
            f"this checkpoint has no scorer {name}: it has {', '.join(split.scorers) or 'none'}"
            + (" (maxsim needs a model with a late interaction)" if name == CHEAP else "")
        )
    return split.scorers[name]()


def _from_factory(name: str, split: HasScorers) -> Scorer:
    module_name, _, factory_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ScorerUnknown(
            f"the scorer {name} cannot be imported ({error}): put its module on the Python path "
            "and install what it imports"
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ScorerUnknown(f"module {module_name} has no function {factory_name}; {name} names it")
    scorer: Scorer = factory(split)  # its own errors keep their traceback
    if not callable(scorer):
        raise ScorerUnknown(
            f"{name} returned {type(scorer).__name__}; a factory returns a function of caption and image indices"
        )
    return scorer

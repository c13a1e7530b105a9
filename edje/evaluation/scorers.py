"""Scorers by name, as written on the command line.

    torch             the checkpoint's joint encoder
    maxsim            its late interaction alone, if it has one
    cascade:BUDGET    maxsim over all k candidates, then torch over the best BUDGET of them
    MODULE:FACTORY    the result of `FACTORY(split)`: an engine, a graph, a table

A factory takes the encoded split (`edje.evaluation.encoded_split`). Its scorer takes (caption, image) pairs in both
directions of retrieval.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Protocol

from edje.calibration import Direction
from edje.evaluation.cascade import Cascade
from edje.evaluation.cost import ScorerCost, cascade_cost
from edje.evaluation.errors import ScorerUnknown
from edje.evaluation.protocol import Scorer, swapped

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
    """Raise `ScorerUnknown` for a name that is a scorer of no split."""
    if name not in (CHEAP, FULL) and not _CASCADE.fullmatch(name) and not _DOTTED.fullmatch(name):
        raise ScorerUnknown(
            f"unknown scorer {name!r}: choose {FULL}, {CHEAP}, cascade:BUDGET with a number of candidates, "
            "or package.module:factory"
        )


def scores_pairs_independently(name: str) -> bool:
    """Whether a pair's score is known not to depend on the other candidates, so that one scoring serves every k."""
    return name in (CHEAP, FULL)


def make_scorer(name: str, split: HasScorers, direction: Direction) -> Scorer:
    """The scorer of this name for (query, candidate) pairs of this direction. Raises `ScorerUnknown`."""
    check_scorer_name(name)

    def directed(scorer: Scorer) -> Scorer:
        if direction == "text-to-image":
            return scorer
        if isinstance(scorer, Cascade):  # its budget is per query, in either direction
            return Cascade(swapped(scorer.cheap), swapped(scorer.full), scorer.budget)
        return swapped(scorer)

    if cascade := _CASCADE.fullmatch(name):
        return directed(Cascade(_from_split(CHEAP, split), _from_split(FULL, split), int(cascade[1])))
    return directed(_from_split(name, split) if name in (CHEAP, FULL) else _from_factory(name, split))


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

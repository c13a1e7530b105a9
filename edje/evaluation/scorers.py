"""Names of scorers, as written on the command line, to scorers.

    torch             the checkpoint's joint encoder
    maxsim            its late interaction alone, where it has one
    cascade:BUDGET    maxsim over all k candidates, then torch over the best BUDGET of them
    MODULE:FACTORY    whatever `FACTORY(subject)` returns: an engine, a graph, a table

A factory's scorer takes (caption, image) pairs in both directions of retrieval; what it may need to know is in the
subject (`edje.evaluation.subject`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Protocol

from edje.evaluation.cascade import Cascade
from edje.evaluation.cost import ScorerCost, cascade_cost
from edje.evaluation.errors import ScorerUnknown
from edje.evaluation.protocol import Scorer, swapped
from edje.evaluation.task import Direction

CHEAP, FULL = "maxsim", "torch"
_CASCADE = re.compile(r"cascade:(\d+)", re.ASCII)
_DOTTED = re.compile(r"(?!cascade:)[^\W\d][\w.]*:[^\W\d]\w*")


class HasScorers(Protocol):
    """What is asked of a subject here: its own scorers of (caption, image) pairs, by name, made when asked for."""

    @property
    def scorers(self) -> Mapping[str, Callable[[], Scorer]]: ...

    @property
    def costs(self) -> Mapping[str, ScorerCost]: ...


def check_scorer_name(name: str) -> None:
    """Raise `ScorerUnknown` for a name that no subject could have a scorer for."""
    if name not in (CHEAP, FULL) and not _CASCADE.fullmatch(name) and not _DOTTED.fullmatch(name):
        raise ScorerUnknown(
            f"unknown scorer {name!r}: choose {FULL}, {CHEAP}, cascade:BUDGET with a number of candidates, "
            "or package.module:factory"
        )


def is_of_pairs_alone(name: str) -> bool:
    """Whether a score is known to depend on nothing but its pair, so that one scoring serves every smaller k."""
    return name in (CHEAP, FULL)


def make_scorer(name: str, subject: HasScorers, direction: Direction) -> Scorer:
    """The scorer of a name, for (query, candidate) pairs of this direction. Raises `ScorerUnknown`."""
    check_scorer_name(name)

    def turned(scorer: Scorer) -> Scorer:
        if direction == "text-to-image":
            return scorer
        if isinstance(scorer, Cascade):  # its budget is a query's, whichever of the two that is
            return Cascade(swapped(scorer.cheap), swapped(scorer.full), scorer.budget)
        return swapped(scorer)

    if cascade := _CASCADE.fullmatch(name):
        return turned(Cascade(_own(CHEAP, subject), _own(FULL, subject), int(cascade[1])))
    return turned(_own(name, subject) if name in (CHEAP, FULL) else _from_factory(name, subject))


def cost_of_scorer(name: str, subject: HasScorers, k: int) -> ScorerCost | None:
    """What a scorer costs where a query has k candidates; None for one that does not say."""
    if cascade := _CASCADE.fullmatch(name):
        cheap, full = subject.costs.get(CHEAP), subject.costs.get(FULL)
        return (
            None if cheap is None or full is None else cascade_cost(cheap, full, int(cascade[1]), k, shared_query=True)
        )
    return subject.costs.get(name)


def _own(name: str, subject: HasScorers) -> Scorer:
    if name not in subject.scorers:
        raise ScorerUnknown(
            f"this checkpoint has no scorer {name}: it has {', '.join(subject.scorers) or 'none'}"
            + (" (maxsim needs a model with a late interaction)" if name == CHEAP else "")
        )
    return subject.scorers[name]()


def _from_factory(name: str, subject: HasScorers) -> Scorer:
    module_name, _, factory_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ScorerUnknown(
            f"the scorer {name} cannot be imported ({error}): is its module on the Python path, "
            "and is everything installed that it imports?"
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ScorerUnknown(f"module {module_name} has no function {factory_name}, which {name} asks for")
    scorer: Scorer = factory(subject)  # what it raises is its own, and keeps its traceback
    if not callable(scorer):
        raise ScorerUnknown(
            f"{name} returned {type(scorer).__name__}; a factory returns a function of caption and image indices"
        )
    return scorer

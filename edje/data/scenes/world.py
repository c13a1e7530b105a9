"""The scene model: what a scene contains, what a caption can state about it, and whether the statement holds.

A scene is two to four objects on a grid. A statement mentions some of them and their relations. Knows neither words
(`edje.data.scenes.captions`) nor pixels (`edje.data.scenes.drawing`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Final, Literal

from edje.data.scenes.random_draws import RandomDraws

SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
PATTERNS: Final = ("solid", "striped", "dotted", "hollow")
SIZES: Final = ("large", "small")
#: Cells per side. Objects in different columns are clearly left or right of each other, because the drawing shifts an
#: object by far less than a cell. Objects in one column are neither.
GRID: Final = 3

Attribute = Literal["shape", "colour", "pattern", "size"]
#: The attribute, or the cell (`place`), that two objects exchange. The new scene is described by the same words.
Swap = Literal["place", "shape", "colour", "pattern", "size"]
SWAPS: Final[tuple[Swap, ...]] = ("place", "colour", "pattern", "shape", "size")


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One object of a scene. Row 0 is the top, column 0 the left."""

    shape: str
    colour: str
    pattern: str
    size: str
    column: int
    row: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in canonical order, so that equal scenes compare equal.

    In drawn scenes no two objects have the same shape and colour, so a mention identifies one object.
    """

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "things", tuple(sorted(self.things)))


@dataclass(frozen=True, slots=True)
class Mention:
    """The attributes of an object that a caption names; None for one that it leaves out."""

    shape: str
    colour: str
    pattern: str | None = None
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the object has all named attributes."""
        return (
            self.shape == thing.shape
            and self.colour == thing.colour
            and (self.pattern is None or self.pattern == thing.pattern)
            and (self.size is None or self.size == thing.size)
        )


@dataclass(frozen=True, slots=True)
class Relation:
    """The mention with index `first` lies left of, or above, the mention with index `second`."""

    kind: Literal["left", "above"]
    first: int
    second: int

    def fits(self, first: Thing, second: Thing) -> bool:
        """Whether the relation holds between these objects."""
        return first.column < second.column if self.kind == "left" else first.row < second.row


@dataclass(frozen=True, slots=True)
class Statement:
    """Mentions of different objects, and relations between them."""

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...] = ()


def holds(statement: Statement, scene: Scene) -> bool:
    """Whether the scene has different objects for all mentions such that every relation holds."""
    candidates = [[thing for thing in scene.things if mention.fits(thing)] for mention in statement.mentions]
    if not all(candidates):
        return False
    return any(
        all(relation.fits(things[relation.first], things[relation.second]) for relation in statement.relations)
        for things in product(*candidates)
        if len(set(map(id, things))) == len(things)
    )


def draw_scene(draws: RandomDraws, num_things: int) -> Scene:
    """A scene of random objects in different cells."""
    cells = draws.shuffled([(column, row) for column in range(GRID) for row in range(GRID)])
    kinds: set[tuple[str, str]] = set()
    things: list[Thing] = []
    while len(things) < num_things:
        kind = (draws.pick(SHAPES), draws.pick(COLOURS))
        if kind not in kinds:
            kinds.add(kind)
            column, row = cells[len(things)]
            things.append(Thing(*kind, draws.pick(PATTERNS), draws.pick(SIZES), column, row))
    return Scene(tuple(things))


def swapped(scene: Scene, swap: Swap, first: int, second: int) -> Scene:
    """The scene in which two objects, given by index, have exchanged their cells or one attribute."""
    one, other = scene.things[first], scene.things[second]
    names = ("column", "row") if swap == "place" else (swap,)
    things = list(scene.things)
    things[first] = replace(one, **{name: getattr(other, name) for name in names})
    things[second] = replace(other, **{name: getattr(one, name) for name in names})
    return Scene(tuple(things))


def draw_confusers(draws: RandomDraws, base: Scene, num_confusers: int, swaps: tuple[Swap, ...]) -> list[Scene] | None:
    """Return different scenes with the same words as `base`, or None if `base` does not have this many.

    The kinds of swap take turns, always beginning with the first kind: every group then has a confuser that contains
    the same objects in other cells, which a first stage without a sense of position cannot distinguish from `base`.
    """
    numbers = range(len(base.things))
    pairs = {
        swap: draws.shuffled([(first, second) for first in numbers for second in numbers if first < second])
        for swap in swaps
    }
    turns = [*swaps[:1], *draws.shuffled(swaps[1:])]
    group = [base]
    while len(group) <= num_confusers:
        if not any(pairs.values()):
            return None
        swap = turns.pop(0)
        turns.append(swap)
        while pairs[swap]:
            scene = swapped(base, swap, *pairs[swap].pop())
            kinds = {(thing.shape, thing.colour) for thing in scene.things}
            if len(kinds) == len(scene.things) and scene not in group:
                group.append(scene)
                break
    return group[1:]


def word_bag(scene: Scene) -> str:
    """Return all words of the scene in sorted order, without their objects. No swap changes the result."""
    return " ".join(
        word
        for name in ("shape", "colour", "pattern", "size")
        for word in sorted(getattr(thing, name) for thing in scene.things)
    )

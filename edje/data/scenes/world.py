"""The world of the drawn scenes: what a scene is, what can be said of it, and whether it is true.

A scene is two to four things on a grid; a statement mentions some of them and how they lie to each other. Knows
neither words nor pixels (`edje.data.scenes.captions`, `edje.data.scenes.drawing`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Final, Literal

from edje.data.scenes.random_draws import Dice

SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
PATTERNS: Final = ("solid", "striped", "dotted", "hollow")
SIZES: Final = ("large", "small")
#: Cells to a side. Whatever stands in another column is clearly to the left or right, since the drawing moves a
#: thing by far less than a cell; in the same column it is neither.
GRID: Final = 3

Attribute = Literal["shape", "colour", "pattern", "size"]
#: How a scene is changed into one that the same words describe: two things exchange this.
Swap = Literal["place", "shape", "colour", "pattern", "size"]
SWAPS: Final[tuple[Swap, ...]] = ("place", "colour", "pattern", "shape", "size")


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One drawn thing. Row 0 is the top, column 0 the left."""

    shape: str
    colour: str
    pattern: str
    size: str
    column: int
    row: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in canonical order, so that equal scenes compare equal.

    In those that are drawn here no two things have both shape and colour in common, so that a mention is of one.
    """

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "things", tuple(sorted(self.things)))


@dataclass(frozen=True, slots=True)
class Mention:
    """A thing as a caption speaks of it; what is None is left unsaid."""

    shape: str
    colour: str
    pattern: str | None = None
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            self.shape == thing.shape
            and self.colour == thing.colour
            and (self.pattern is None or self.pattern == thing.pattern)
            and (self.size is None or self.size == thing.size)
        )


@dataclass(frozen=True, slots=True)
class Relation:
    """The mention numbered `first` lies to the left of, or above, the one numbered `second`."""

    kind: Literal["left", "above"]
    first: int
    second: int

    def fits(self, first: Thing, second: Thing) -> bool:
        return first.column < second.column if self.kind == "left" else first.row < second.row


@dataclass(frozen=True, slots=True)
class Statement:
    """Mentions of different things, and how they lie to each other."""

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...] = ()


def holds(statement: Statement, scene: Scene) -> bool:
    """Whether things can be found in the scene for all mentions, so that every relation is true of them."""
    candidates = [[thing for thing in scene.things if mention.fits(thing)] for mention in statement.mentions]
    if not all(candidates):
        return False
    return any(
        all(relation.fits(things[relation.first], things[relation.second]) for relation in statement.relations)
        for things in product(*candidates)
        if len(set(map(id, things))) == len(things)
    )


def draw_scene(dice: Dice, num_things: int) -> Scene:
    """Things of random kind in different cells."""
    cells = dice.shuffled([(column, row) for column in range(GRID) for row in range(GRID)])
    kinds: set[tuple[str, str]] = set()
    things: list[Thing] = []
    while len(things) < num_things:
        kind = (dice.pick(SHAPES), dice.pick(COLOURS))
        if kind not in kinds:
            kinds.add(kind)
            column, row = cells[len(things)]
            things.append(Thing(*kind, dice.pick(PATTERNS), dice.pick(SIZES), column, row))
    return Scene(tuple(things))


def swapped(scene: Scene, swap: Swap, first: int, second: int) -> Scene:
    """The scene in which two things, by number, have exchanged their places or one attribute."""
    one, other = scene.things[first], scene.things[second]
    names = ("column", "row") if swap == "place" else (swap,)
    things = list(scene.things)
    things[first] = replace(one, **{name: getattr(other, name) for name in names})
    things[second] = replace(other, **{name: getattr(one, name) for name in names})
    return Scene(tuple(things))


def draw_confusers(dice: Dice, base: Scene, num_confusers: int, swaps: tuple[Swap, ...]) -> list[Scene] | None:
    """Scenes made of the same words as `base` and no two alike, or None where `base` does not give so many.

    The kinds of swap take turns, beginning with the first for every group: a first stage that sees which things
    there are but not where they lie must always meet one scene that it cannot tell from `base`.
    """
    numbers = range(len(base.things))
    ways = {
        swap: dice.shuffled([(first, second) for first in numbers for second in numbers if first < second])
        for swap in swaps
    }
    turns = [*swaps[:1], *dice.shuffled(swaps[1:])]
    group = [base]
    while len(group) <= num_confusers:
        if not any(ways.values()):
            return None
        swap = turns.pop(0)
        turns.append(swap)
        while ways[swap]:
            scene = swapped(base, swap, *ways[swap].pop())
            kinds = {(thing.shape, thing.colour) for thing in scene.things}
            if len(kinds) == len(scene.things) and scene not in group:
                group.append(scene)
                break
    return group[1:]


def word_bag(scene: Scene) -> str:
    """Every word of the scene without its bonds, in one spelling. All swaps leave it as it is."""
    return " ".join(
        word
        for name in ("shape", "colour", "pattern", "size")
        for word in sorted(getattr(thing, name) for thing in scene.things)
    )

"""Captions of drawn scenes: statements that hold for one scene and for none of its confusers, as English sentences.

Uses about sixty words. Knows nothing of pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2, perm
from typing import Final, Literal

from edje.data.dataset import GroundingLabel, GroundingRole
from edje.data.scenes.random_draws import RandomDraws
from edje.data.scenes.world import (
    COLOURS,
    GRID,
    PATTERNS,
    SHAPES,
    SIZES,
    Mention,
    Relation,
    Scene,
    Statement,
    Thing,
    holds,
)

_SIZE_WORDS: Final = {"large": ("large", "big"), "small": ("small", "little", "tiny")}
_PATTERN_WORDS: Final = {
    "solid": ("solid", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "hollow": ("hollow", "empty"),
}
_PATTERN_TAILS: Final = {"striped": ("with stripes",), "dotted": ("with dots", "with spots")}
_DIRECTIONS: Final = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_NOUN: Final = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_DIRECTION: Final = re.compile(r"\b(left|right|above|over|below|under|beneath)\b")
_VERBS: Final = ("is", "is", "sits", "lies", "can be seen")
_OPENINGS: Final = ("", "there is ", "we see ", "a picture of ", "an image with ")
_KIND_BITS: Final = log2(len(SHAPES)) + log2(len(COLOURS))
_RELATION_BITS: Final = 1.2  # it holds for about a third of all pairs
#: The least information of a caption in bits. With 14.5, one caption in 90 also holds for another of 1,000 random
#: scenes, so a perfect reader reaches R@1 99.4.
_MIN_BITS: Final = 14.5
_TYPICAL_THINGS: Final = 4
#: Attempts per caption, after which short sentences cannot distinguish the scenes of the group.
_MAX_TRIES: Final = 60


@dataclass(frozen=True, slots=True)
class SceneCaption:
    """A sentence and its statement."""

    text: str
    statement: Statement


@dataclass(frozen=True, slots=True)
class _Link:
    """The words between two mentions, and the relations that they state."""

    words: str
    relations: tuple[Relation, ...]


def draw_captions(
    draws: RandomDraws, scene: Scene, others: Sequence[Scene], num_captions: int
) -> list[SceneCaption] | None:
    """Different captions that hold for `scene` and for none of `others`, or None if too few are found."""
    captions: dict[str, SceneCaption] = {}
    for attempt in range(_MAX_TRIES * num_captions):
        if len(captions) == num_captions:
            break
        caption = _draw_caption(draws, scene, detail=0.55 + 0.45 * attempt / (_MAX_TRIES * num_captions))
        statement = caption.statement
        if _bits(statement) >= _MIN_BITS and not any(holds(statement, other) for other in others):
            captions.setdefault(caption.text, caption)
    return list(captions.values()) if len(captions) == num_captions else None


def grounding_labels(text: str, scene: Scene) -> list[GroundingLabel]:
    """The grounding labels of a caption for a scene: of each shape's name and of each direction.

    The text has no punctuation. Objects that the scene lacks have no label.
    """
    things = {(thing.colour, thing.shape): thing for thing in scene.things}
    nouns = [(match.start(2), match.end(), things.get((match[1], match[2]))) for match in _NOUN.finditer(text)]
    found = [GroundingLabel(start, GroundingRole.NAMED, _cell(thing)) for start, _, thing in nouns if thing is not None]
    for match in _DIRECTION.finditer(text):
        num_before = sum(start < match.start() for start, _, _ in nouns)
        if len(nouns) < 2 or num_before == len(nouns):
            continue  # not a sentence of this module
        subject = num_before - 1
        if num_before == 0:  # "above a star is a circle"
            subject = 1
        elif num_before == 2 and "which" not in text[nouns[1][1] : match.start()]:
            subject = 0  # "a circle is left of a star and above a cross"
        one, other = nouns[subject][2], nouns[num_before][2]
        if one is not None and other is not None:
            found.append(GroundingLabel(match.start(), GroundingRole.SUBJECT, _cell(one)))
            found.append(GroundingLabel(match.start(), GroundingRole.OBJECT, _cell(other)))
            found.append(GroundingLabel(match.start(), GroundingRole.HOLDS, _direction_holds(match[1], one, other)))
    return found


def _cell(thing: Thing) -> int:
    return thing.row * GRID + thing.column


def _direction_holds(word: str, one: Thing, other: Thing) -> bool:
    """Whether `one` lies in this direction of `other`."""
    direction = next(name for name, phrases in _DIRECTIONS.items() if any(word in phrase for phrase in phrases))
    kind: Literal["left", "above"] = "left" if direction in ("left", "right") else "above"
    first, second = (one, other) if direction == kind else (other, one)
    return Relation(kind, 0, 1).fits(first, second)


def _bits(statement: Statement) -> float:
    """The information of a statement about which scene it describes."""
    num_mentions = len(statement.mentions)
    details = sum(
        log2(len(PATTERNS)) * (mention.pattern is not None) + log2(len(SIZES)) * (mention.size is not None)
        for mention in statement.mentions
    )
    total = num_mentions * _KIND_BITS + details + len(statement.relations) * _RELATION_BITS
    return total - log2(perm(_TYPICAL_THINGS, num_mentions))


def _draw_caption(draws: RandomDraws, scene: Scene, detail: float) -> SceneCaption:
    """A random caption that holds for the scene. `detail` is the probability that a caption names an attribute."""
    num_mentions = draws.pick((2, 2, 3, 3, 4)[: 2 * len(scene.things) - 2])
    things = draws.shuffled(scene.things)[:num_mentions]
    if num_mentions == 2:
        # Two mentions carry enough information only with nearly all attributes.
        detail = max(detail, 0.9)
    mentions = tuple(
        Mention(
            thing.shape,
            thing.colour,
            thing.pattern if draws.chance(detail) else None,
            thing.size if draws.chance(detail / num_mentions * 2) else None,
        )
        for thing in things
    )
    article = "the" if draws.chance(0.2) else "a"
    text, relations = _sentence(draws, things, [_noun(draws, mention, article) for mention in mentions])
    return SceneCaption(text, Statement(mentions, relations))


def _noun(draws: RandomDraws, mention: Mention, article: str) -> str:
    words = []
    if mention.size is not None:
        words.append(draws.pick(_SIZE_WORDS[mention.size]))
    tail = ""
    if mention.pattern is not None:
        if mention.pattern in _PATTERN_TAILS and draws.chance(0.3):
            tail = " " + draws.pick(_PATTERN_TAILS[mention.pattern])
        else:
            words.append(draws.pick(_PATTERN_WORDS[mention.pattern]))
    words += [mention.colour, mention.shape]
    if article == "a" and words[0][0] in "aeio":
        article = "an"
    return " ".join((article, *words)) + tail


def _link(draws: RandomDraws, things: Sequence[Thing], first: int, second: int) -> _Link:
    """The relation of one object to another: along one axis, or along both where both differ."""
    one, other = things[first], things[second]
    directions = []
    if one.column != other.column:
        is_left = one.column < other.column
        relation = Relation("left", first, second) if is_left else Relation("left", second, first)
        directions.append(("left" if is_left else "right", relation))
    if one.row != other.row:
        is_above = one.row < other.row
        relation = Relation("above", first, second) if is_above else Relation("above", second, first)
        directions.append(("above" if is_above else "below", relation))
    if not draws.chance(0.25):
        directions = [draws.pick(directions)]
    words = " and ".join(draws.pick(_DIRECTIONS[name]) for name, _ in reversed(directions))
    return _Link(words, tuple(relation for _, relation in directions))


def _sentence(draws: RandomDraws, things: Sequence[Thing], nouns: Sequence[str]) -> tuple[str, tuple[Relation, ...]]:
    """A sentence with these nouns, and the relations that it states."""
    opening, verb = draws.pick(_OPENINGS), draws.pick(_VERBS)
    if draws.chance(0.1):
        return f"{opening}{', '.join(nouns[:-1])} and {nouns[-1]}", ()
    link = _link(draws, things, 0, 1)
    clause = f"{nouns[0]} {verb} {link.words} {nouns[1]}"
    if len(nouns) == 4:
        other = _link(draws, things, 2, 3)
        text = f"{clause} {draws.pick(('and', 'while'))} {nouns[2]} {verb} {other.words} {nouns[3]}"
        return text, link.relations + other.relations
    if len(nouns) == 3 and draws.chance(0.55):
        is_chain = draws.chance(0.5)
        more = _link(draws, things, 1 if is_chain else 0, 2)
        text = f"{clause}{f', which {verb}' if is_chain else ' and'} {more.words} {nouns[2]}"
        return text, link.relations + more.relations
    if draws.chance(0.25) and not link.words.startswith(("left", "right")):
        clause = f"{link.words} {nouns[1]} {verb} {nouns[0]}"
    elif opening:
        clause = f"{opening}{nouns[0]} {link.words} {nouns[1]}"
    return f"{clause}, and {nouns[2]}" if len(nouns) == 3 else clause, link.relations

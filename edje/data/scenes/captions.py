"""Sentences about a drawn scene: what to say, so that it is true of this one and of no other given, and in which words.

Knows the world of `edje.data.scenes.world` and about sixty words of English; knows nothing of pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2, perm
from typing import Final, Literal

from edje.data.dataset import Claim, Role
from edje.data.scenes.random_draws import Dice
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
_SAID_OF_KIND: Final = log2(len(SHAPES)) + log2(len(COLOURS))
_SAID_OF_RELATION: Final = 1.2  # a third of all pairs stand so
#: Bits below which a caption says too little. With 14.5, of 1,000 scenes drawn at random, one caption in 90 is true of
#: a second scene, so that a perfect reader comes to R@1 99.4.
_MIN_BITS: Final = 14.5
_TYPICAL_THINGS: Final = 4
#: A statement is sought this often; then the group is too entangled for short sentences.
_MAX_TRIES: Final = 60


@dataclass(frozen=True, slots=True)
class SceneCaption:
    """A sentence and what it states."""

    text: str
    statement: Statement


@dataclass(frozen=True, slots=True)
class _Link:
    """What joins two mentions: the words from the first to the second, and the relations they state."""

    words: str
    relations: tuple[Relation, ...]


def draw_captions(dice: Dice, scene: Scene, others: Sequence[Scene], num_captions: int) -> list[SceneCaption] | None:
    """Different captions, each true of `scene` and false of all `others`; None where that many are not found."""
    captions: dict[str, SceneCaption] = {}
    for attempt in range(_MAX_TRIES * num_captions):
        if len(captions) == num_captions:
            break
        caption = _draw_caption(dice, scene, detail=0.55 + 0.45 * attempt / (_MAX_TRIES * num_captions))
        said = caption.statement
        if _bits(said) >= _MIN_BITS and not any(holds(said, other) for other in others):
            captions.setdefault(caption.text, caption)
    return list(captions.values()) if len(captions) == num_captions else None


def claims(text: str, scene: Scene) -> list[Claim]:
    """What each shape's name and each direction in a caption says beside a scene; the text without punctuation."""
    things = {(thing.colour, thing.shape): thing for thing in scene.things}
    nouns = [(match.start(2), match.end(), things.get((match[1], match[2]))) for match in _NOUN.finditer(text)]
    found = [Claim(start, Role.NAMED, _cell(thing)) for start, _, thing in nouns if thing is not None]
    for match in _DIRECTION.finditer(text):
        num_before = sum(start < match.start() for start, _, _ in nouns)
        if len(nouns) < 2 or num_before == len(nouns):
            continue  # not a sentence of ours
        subject = num_before - 1
        if num_before == 0:  # above a star is a circle
            subject = 1
        elif num_before == 2 and "which" not in text[nouns[1][1] : match.start()]:
            subject = 0  # a circle is left of a star and above a cross
        one, other = nouns[subject][2], nouns[num_before][2]
        if one is not None and other is not None:
            found.append(Claim(match.start(), Role.SUBJECT, _cell(one)))
            found.append(Claim(match.start(), Role.OBJECT, _cell(other)))
            found.append(Claim(match.start(), Role.TRUE, _is_true(match[1], one, other)))
    return found


def _cell(thing: Thing) -> int:
    return thing.row * GRID + thing.column


def _is_true(word: str, one: Thing, other: Thing) -> bool:
    """Whether the one thing lies to the other as the word for a direction says."""
    direction = next(name for name, phrases in _DIRECTIONS.items() if any(word in phrase for phrase in phrases))
    kind: Literal["left", "above"] = "left" if direction in ("left", "right") else "above"
    first, second = (one, other) if direction == kind else (other, one)
    return Relation(kind, 0, 1).fits(first, second)


def _bits(statement: Statement) -> float:
    """How much a statement narrows down which scene is meant."""
    num_mentions = len(statement.mentions)
    details = sum(
        log2(len(PATTERNS)) * (mention.pattern is not None) + log2(len(SIZES)) * (mention.size is not None)
        for mention in statement.mentions
    )
    said = num_mentions * _SAID_OF_KIND + details + len(statement.relations) * _SAID_OF_RELATION
    return said - log2(perm(_TYPICAL_THINGS, num_mentions))


def _draw_caption(dice: Dice, scene: Scene, detail: float) -> SceneCaption:
    """Any true caption. `detail` is the probability with which an attribute is said."""
    num_mentions = dice.pick((2, 2, 3, 3, 4)[: 2 * len(scene.things) - 2])
    things = dice.shuffled(scene.things)[:num_mentions]
    if num_mentions == 2:
        # So little can only be enough if nearly all is said.
        detail = max(detail, 0.9)
    mentions = tuple(
        Mention(
            thing.shape,
            thing.colour,
            thing.pattern if dice.chance(detail) else None,
            thing.size if dice.chance(detail / num_mentions * 2) else None,
        )
        for thing in things
    )
    article = "the" if dice.chance(0.2) else "a"
    text, relations = _sentence(dice, things, [_noun(dice, mention, article) for mention in mentions])
    return SceneCaption(text, Statement(mentions, relations))


def _noun(dice: Dice, mention: Mention, article: str) -> str:
    words = []
    if mention.size is not None:
        words.append(dice.pick(_SIZE_WORDS[mention.size]))
    tail = ""
    if mention.pattern is not None:
        if mention.pattern in _PATTERN_TAILS and dice.chance(0.3):
            tail = " " + dice.pick(_PATTERN_TAILS[mention.pattern])
        else:
            words.append(dice.pick(_PATTERN_WORDS[mention.pattern]))
    words += [mention.colour, mention.shape]
    if article == "a" and words[0][0] in "aeio":
        article = "an"
    return " ".join((article, *words)) + tail


def _link(dice: Dice, things: Sequence[Thing], first: int, second: int) -> _Link:
    """How one thing lies to another: along one axis, or along both where both can be said."""
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
    if not dice.chance(0.25):
        directions = [dice.pick(directions)]
    words = " and ".join(dice.pick(_DIRECTIONS[name]) for name, _ in reversed(directions))
    return _Link(words, tuple(relation for _, relation in directions))


def _sentence(dice: Dice, things: Sequence[Thing], nouns: Sequence[str]) -> tuple[str, tuple[Relation, ...]]:
    """Words around the nouns, and the relations they state."""
    opening, verb = dice.pick(_OPENINGS), dice.pick(_VERBS)
    if dice.chance(0.1):
        return f"{opening}{', '.join(nouns[:-1])} and {nouns[-1]}", ()
    link = _link(dice, things, 0, 1)
    said = f"{nouns[0]} {verb} {link.words} {nouns[1]}"
    if len(nouns) == 4:
        other = _link(dice, things, 2, 3)
        text = f"{said} {dice.pick(('and', 'while'))} {nouns[2]} {verb} {other.words} {nouns[3]}"
        return text, link.relations + other.relations
    if len(nouns) == 3 and dice.chance(0.55):
        is_chain = dice.chance(0.5)
        more = _link(dice, things, 1 if is_chain else 0, 2)
        text = f"{said}{f', which {verb}' if is_chain else ' and'} {more.words} {nouns[2]}"
        return text, link.relations + more.relations
    if dice.chance(0.25) and not link.words.startswith(("left", "right")):
        said = f"{link.words} {nouns[1]} {verb} {nouns[0]}"
    elif opening:
        said = f"{opening}{nouns[0]} {link.words} {nouns[1]}"
    return f"{said}, and {nouns[2]}" if len(nouns) == 3 else said, link.relations

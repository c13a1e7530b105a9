"""The first stage of the demo: ranks images for a text, and texts for an image, quickly.

`WordOverlap` needs neither a model nor pixels: it counts the words that a query shares with a caption, and weights rare
words more. It gives an order to rerank if the checkpoint has no first stage.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

_WORD = re.compile(r"\w+")

#: Names with their scores, best first.
Found = list[tuple[str, float]]


class FirstStage(Protocol):
    """Finds candidates, best first; ties are in the order of names."""

    #: Description for people, shown after "found by".
    means: str

    def images(self, text: str, top_n: int) -> Found:
        """Return the best images for a text."""
        ...

    def texts(self, image_id: str, texts: Mapping[str, str], top_n: int) -> Found:
        """Return the best of these texts for an image, by name."""
        ...


class WordOverlap:
    """Scores captions by the words they share with a query. Implements `FirstStage`."""

    means = "words shared with the caption"

    def __init__(self, captions: Mapping[str, str]) -> None:
        """`captions` by image id."""
        self._captions = captions
        self._words = {name: words_of(caption) for name, caption in captions.items()}
        frequency = Counter(word for words in self._words.values() for word in words)
        self._weights = {word: math.log(1 + len(captions) / count) for word, count in frequency.items()}

    def images(self, text: str, top_n: int) -> Found:
        asked = words_of(text)
        scores = {
            name: sum(self._weights[word] for word in sorted(words & asked)) for name, words in self._words.items()
        }
        return best_of(scores, top_n)

    def texts(self, image_id: str, texts: Mapping[str, str], top_n: int) -> Found:
        return WordOverlap(texts).images(self._captions[image_id], top_n)


def best_of(scores: Mapping[str, float], top_n: int) -> Found:
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:top_n]


def words_of(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower()))

"""A first stage that needs no model: it counts the words that a query shares with a caption.

A word counts the more the fewer captions have it. What an installation has here is a vector search; this one is only
there so that there is an order to rerank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

_WORD = re.compile(r"\w+")


class WordOverlap:
    """Scores captions by the words they share with a query."""

    def __init__(self, captions: Mapping[str, str]) -> None:
        """`captions` by id."""
        self._words = {name: words_of(caption) for name, caption in captions.items()}
        frequency = Counter(word for words in self._words.values() for word in words)
        self._weights = {word: math.log(1 + len(captions) / count) for word, count in frequency.items()}

    def best(self, query: str, top_n: int) -> list[tuple[str, float]]:
        """The best ids with their scores; those that share nothing with the query follow in the order of their ids."""
        asked = words_of(query)
        scores = {
            name: sum(self._weights[word] for word in sorted(words & asked)) for name, words in self._words.items()
        }
        return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:top_n]


def words_of(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower()))

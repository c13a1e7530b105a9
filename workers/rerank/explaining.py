"""Explains the best results of a request: how similar each word of the text is to each visual token of the image.

Pure: the similarities come from an engine with a late interaction (`trt.contract.ExplainsPairs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from protocols.events import WordSimilarities
from protocols.fields import MAX_EXPLAINED_TOKENS, MAX_EXPLAINED_WORD_CHARS, MAX_EXPLAINED_WORDS
from workers.rerank.request import Request

#: Most results that are explained.
MAX_EXPLAINED_RESULTS = 10
#: Most numbers in the explanations of one reply: 200 kB of JSON.
MAX_EXPLAINED_VALUES = 32_768
#: Decimals of a similarity in a reply.
SIMILARITY_DECIMALS = 3

#: Returns the words of a text, each with the positions of its pieces among the ids.
Words = Callable[[str], Sequence[tuple[str, Sequence[int]]]]


def pairs_to_explain(request: Request, *, num_visual_tokens: int, max_pairs: int) -> NDArray[np.int32]:
    """Return the distinct pairs of the best results: as many as a reply may explain, at most `max_pairs`.

    The request must have a ranking.
    """
    if request.ranking is None or num_visual_tokens > MAX_EXPLAINED_TOKENS:
        return np.zeros(0, np.int32)
    positions = request.ranking.order[:MAX_EXPLAINED_RESULTS]
    pairs = positions if request.pair_of_candidate is None else request.pair_of_candidate[positions]
    distinct = list(dict.fromkeys(pairs.tolist()))
    explained: list[int] = []
    num_values = 0
    for pair in distinct[:max_pairs]:
        num_words = min(len(request.text_ids[request.text_of_pair(pair)]), MAX_EXPLAINED_WORDS)
        num_values += num_words * num_visual_tokens
        if explained and num_values > MAX_EXPLAINED_VALUES:
            break
        explained.append(pair)
    return np.array(explained, np.int32)


def explanations_of(
    request: Request, pairs: NDArray[np.int32], similarities: Sequence[NDArray[np.float32]], words: Words
) -> Mapping[int, Sequence[WordSimilarities]]:
    """Return the explanation of each result by its position in the request.

    `similarities[i]` is `(text tokens, visual tokens)` of `pairs[i]`. A word counts as its most similar piece.
    """
    by_pair: dict[int, Sequence[WordSimilarities]] = {}
    for pair, matrix in zip(pairs.tolist(), similarities, strict=True):
        text = request.texts[request.text_of_pair(pair)]
        by_pair[pair] = [
            WordSimilarities(word=word[:MAX_EXPLAINED_WORD_CHARS], similarities=_best(matrix, pieces))
            for word, pieces in words(text)[:MAX_EXPLAINED_WORDS]
        ]
    if request.ranking is None:
        return {}
    positions = request.ranking.order[:MAX_EXPLAINED_RESULTS]
    pair_numbers = positions if request.pair_of_candidate is None else request.pair_of_candidate[positions]
    return {
        position: by_pair[pair]
        for position, pair in zip(positions.tolist(), pair_numbers.tolist(), strict=True)
        if pair in by_pair
    }


def _best(matrix: NDArray[np.float32], pieces: Sequence[int]) -> list[float]:
    best = matrix[list(pieces)].max(axis=0).astype(np.float64)
    return [float(value) for value in np.clip(np.round(best, SIMILARITY_DECIMALS), -1.0, 1.0)]

"""The few sizes that a plan is run at, and how the texts and pairs of a call are laid out in them.

A CUDA graph holds for one size of everything, so texts are padded to a length bucket and pairs to a number of pairs.
Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt.profiles import Range


@dataclass(frozen=True, slots=True)
class Buckets:
    """Ascending sizes of one dimension."""

    sizes: tuple[int, ...]

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def smallest_for(self, size: int) -> int:
        """The smallest bucket that holds `size`, which is at most the largest one."""
        return next(bucket for bucket in self.sizes if bucket >= size)


def length_buckets(ranges: Sequence[Range]) -> Buckets:
    """Where the profiles end: what texts are padded to."""
    return Buckets(tuple(sorted({each.max for each in ranges})))


def count_buckets(ranges: Sequence[Range], most: int, *, steps: int, fixed: bool) -> Buckets:
    """Sizes for up to `most` images, queries or pairs at once, or up to what the profiles take if that is less.

    `steps` of them lead up to the end of each profile: more are less padding, and longer to warm up. `fixed` leaves
    the largest alone: whatever comes runs at one size, and so is computed the same way.
    """
    reached = {each.max * step // steps for each in ranges for step in range(1, steps + 1)}
    sizes = sorted(size for size in reached if any(size in each for each in ranges))
    largest = next((size for size in sizes if size >= most), sizes[-1])
    return Buckets((largest,) if fixed else tuple(size for size in sizes if size <= largest))


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Texts that are padded to the same length and computed together."""

    text_tokens: int  # a length bucket
    texts: NDArray[np.int64]  # their numbers in the call, at most as many as a plan takes


def text_blocks(lengths: NDArray[np.int64], buckets: Buckets, max_queries: int) -> list[TextBlock]:
    """Lay out texts of these lengths, none longer than the largest bucket; every text is in one block."""
    padded = np.asarray(buckets.sizes)[np.searchsorted(buckets.sizes, lengths)]
    return [
        TextBlock(int(text_tokens), texts[start : start + max_queries])
        for text_tokens in np.unique(padded)
        for texts in [np.flatnonzero(padded == text_tokens)]
        for start in range(0, len(texts), max_queries)
    ]


@dataclass(frozen=True, slots=True)
class PairPiece:
    """Pairs that are scored together: all of one block's texts."""

    block: int
    pairs: NDArray[np.int64]  # their numbers in the call
    rows: NDArray[np.int32]  # for each, its text's place in the block


def pair_pieces(
    blocks: Sequence[TextBlock], num_texts: int, pair_query: NDArray[np.int32], max_pairs: int
) -> Iterator[PairPiece]:
    """Lay out pairs that name texts by number; every pair is in one piece."""
    block_of, row_of = np.zeros(num_texts, np.int32), np.zeros(num_texts, np.int32)
    for number, block in enumerate(blocks):
        block_of[block.texts] = number
        row_of[block.texts] = np.arange(len(block.texts))
    of_pair = block_of[pair_query]
    for number in range(len(blocks)):
        pairs = np.flatnonzero(of_pair == number)
        for start in range(0, len(pairs), max_pairs):
            piece = pairs[start : start + max_pairs]
            yield PairPiece(number, piece, row_of[pair_query[piece]])

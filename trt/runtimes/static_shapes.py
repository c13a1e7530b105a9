"""The few sizes at which a plan or a CUDA graph runs, and the layout of a call's texts and pairs in these sizes.

A CUDA graph has fixed shapes, so texts are padded to a length bucket and pairs to one of a few numbers of pairs.
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
        """Return the smallest bucket of at least `size`; `size` must not exceed the largest bucket."""
        return next(bucket for bucket in self.sizes if bucket >= size)


def length_buckets(ranges: Sequence[Range]) -> Buckets:
    """Return the upper ends of the profiles' ranges, to which texts are padded."""
    return Buckets(tuple(sorted({each.max for each in ranges})))


def count_buckets(ranges: Sequence[Range], most: int, *, steps: int, fixed: bool) -> Buckets:
    """Return the sizes for up to `most` images, queries or pairs in one run, limited by the profiles' largest size.

    Each profile's range is divided into `steps` steps: more steps mean less padding and a longer warm-up. `fixed` keeps
    only the largest size, so that every call is computed in the same way.
    """
    reached = {each.max * step // steps for each in ranges for step in range(1, steps + 1)}
    sizes = sorted(size for size in reached if any(size in each for each in ranges))
    largest = next((size for size in sizes if size >= most), sizes[-1])
    return Buckets((largest,) if fixed else tuple(size for size in sizes if size <= largest))


def halving_buckets(smallest: int, largest: int) -> Buckets:
    """Return the powers of two from `smallest` to `largest`, the sizes halfway between them, and `largest`.

    Above the smallest size, at most a third of a run is padding.
    """
    powers = [1 << power for power in range(largest.bit_length() + 1)]
    sizes = {size for power in powers for size in (power, power * 3 // 2) if smallest <= size < largest}
    return Buckets((*sorted(sizes), largest))


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Texts that are padded to the same length and encoded together."""

    text_tokens: int  # a length bucket
    texts: NDArray[np.int64]  # their indices in the call, at most as many as fit in one run


def text_blocks(lengths: NDArray[np.int64], buckets: Buckets, max_queries: int) -> list[TextBlock]:
    """Divide texts of these lengths into blocks; no text may be longer than the largest bucket."""
    padded = np.asarray(buckets.sizes)[np.searchsorted(buckets.sizes, lengths)]
    return [
        TextBlock(int(text_tokens), texts[start : start + max_queries])
        for text_tokens in np.unique(padded)
        for texts in [np.flatnonzero(padded == text_tokens)]
        for start in range(0, len(texts), max_queries)
    ]


@dataclass(frozen=True, slots=True)
class PairPiece:
    """Pairs that are scored together: their texts are all in one block."""

    block: int
    pairs: NDArray[np.int64]  # their indices in the call
    rows: NDArray[np.int32]  # for each pair, the index of its text in the block


def pair_pieces(
    blocks: Sequence[TextBlock], num_texts: int, pair_query: NDArray[np.int32], max_pairs: int
) -> Iterator[PairPiece]:
    """Divide pairs into pieces; `pair_query` holds the index of each pair's text."""
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


def padded_texts(
    text_ids: Sequence[Sequence[int]], block: TextBlock, num_rows: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return a block's texts as `(num_rows, text tokens)` ids padded with zeros, and their `(num_rows,)` lengths.

    Rows without a text have length 1, because attention needs at least one token.
    """
    ids, lengths = np.zeros((num_rows, block.text_tokens), np.int32), np.ones(num_rows, np.int32)
    for row, text in enumerate(block.texts.tolist()):
        ids[row, : len(text_ids[text])] = text_ids[text]
        lengths[row] = len(text_ids[text])
    return ids, lengths

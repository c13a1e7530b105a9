"""Which pairs of one call are computed together: pairs of equal text length, in pieces the caches hold.

Grouping can also be fixed: every group then has the same number of pairs, filled up where pairs are lacking, so that a
pair is computed in the same shape whatever else is in the call. Knows lengths only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

#: A group smaller than this is too little work for a matrix product, and joins the next longer texts, padded.
MIN_GROUP_PAIRS = 4
#: Padding beyond this costs more than a separate call does.
MAX_PADDING = 8


def groups_by_length(lengths: NDArray[np.int64], max_pairs: int) -> Iterator[NDArray[np.int64]]:
    """Cut pairs with these text lengths into groups of at most `max_pairs`, shortest first.

    The lengths in a group are equal; only a group of fewer than `MIN_GROUP_PAIRS` takes in longer texts, by at most
    `MAX_PADDING` tokens.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    start = 0
    while start < len(order):
        shortest = ordered[start]
        end = int(np.searchsorted(ordered, shortest, side="right"))
        if end - start < MIN_GROUP_PAIRS:
            longest_allowed = int(np.searchsorted(ordered, shortest + MAX_PADDING, side="right"))
            end = min(start + MIN_GROUP_PAIRS, longest_allowed)
        end = min(end, start + max_pairs)
        yield order[start:end]
        start = end


def fixed_groups(lengths: NDArray[np.int64], num_pairs: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Cut pairs with these text lengths into groups of exactly `num_pairs` of one length, shortest first.

    Yields the pairs of each group and how many of them count: the last one fills up what is lacking.
    """
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        for start in range(0, len(alike), num_pairs):
            group = alike[start : start + num_pairs]
            yield np.pad(group, (0, num_pairs - len(group)), mode="edge"), len(group)

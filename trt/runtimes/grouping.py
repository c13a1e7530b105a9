"""Groups the pairs of one call for the torch runtime on a CPU. Knows text lengths only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

#: A smaller group is too little work for a matrix product; it is filled up with the next longer texts, padded.
MIN_GROUP_PAIRS = 4
#: More padding, in tokens, costs more than a separate call.
MAX_PADDING = 8


def groups_by_length(lengths: NDArray[np.int64], max_pairs: int) -> Iterator[NDArray[np.int64]]:
    """Cut pairs with these text lengths into groups of at most `max_pairs`, shortest first.

    The lengths in a group are equal. Only a group of fewer than `MIN_GROUP_PAIRS` is filled up with texts that are
    longer by at most `MAX_PADDING` tokens.
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

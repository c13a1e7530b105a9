"""Which rows of a staging buffer are given out next, and what has to be over before a row is written again.

Knows numbers and marks; what a mark is, and what lies in the rows, is the owner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from trt.contract import LimitExceeded

Mark = TypeVar("Mark")


class StagingRing(Generic[Mark]):
    """Rows in turn. Those of one `take` are the caller's until `num_rows` more have been taken."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._next_row = 0
        self._held: list[tuple[range, Mark]] = []

    def take(self, num_rows: int) -> tuple[range, list[Mark]]:
        """The next rows, side by side, and the marks to wait for before they are written.

        Raises `LimitExceeded` for more rows than there are.
        """
        if num_rows > self._num_rows:
            raise LimitExceeded(f"{num_rows} slots staged in one call; this engine takes {self._num_rows}")
        start = self._next_row if self._next_row + num_rows <= self._num_rows else 0
        rows = range(start, start + num_rows)
        self._next_row = rows.stop
        marks = [mark for held, mark in self._held if _overlap(held, rows)]
        self._held = [(held, mark) for held, mark in self._held if not _overlap(held, rows)]
        return rows, marks

    def hold(self, rows: range, mark: Mark) -> None:
        """These rows are read until `mark`."""
        self._held.append((rows, mark))


def runs(rows: Sequence[int]) -> list[range]:
    """Different rows as the fewest stretches of neighbours, ascending."""
    found: list[range] = []
    for row in sorted(rows):
        if found and found[-1].stop == row:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop

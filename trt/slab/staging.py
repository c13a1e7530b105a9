"""The token slab on a device: a ring of pinned rows on the host, and a stream that copies them to slots.

`StagedSlab` is the common base of the slabs of pycuda and torch. The filling and the scoring thread never wait for each
other on the host: a gather waits on the device for earlier publications, and a row is reused only after its copy.
Knows bytes only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from trt.contract import LimitExceeded
from trt.slab.layout import SlotLayout

#: Enough for a request of 1,000 candidates on each of four fetching threads; 100 MB of pinned memory at 24.6 kB a row.
STAGING_ROWS = 4096


class FillEvent(Protocol):
    """A point in the stream that fills slots."""

    def synchronize(self) -> object:
        """Wait on the host until the stream has reached this point."""
        ...


Event = TypeVar("Event", bound=FillEvent)


class StagingRing(Generic[Event]):
    """Allocates row numbers in a ring. The caller owns the rows of a `take` until `num_rows` further rows are taken."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._next_row = 0
        self._held: list[tuple[range, Event]] = []

    def take(self, num_rows: int) -> tuple[range, list[Event]]:
        """Return the next rows, all adjacent, and the events to wait for before they are written.

        Raises `LimitExceeded` for more rows than the ring has.
        """
        if num_rows > self._num_rows:
            raise LimitExceeded(f"{num_rows} slots staged in one call; this engine takes at most {self._num_rows}")
        start = self._next_row if self._next_row + num_rows <= self._num_rows else 0
        rows = range(start, start + num_rows)
        self._next_row = rows.stop
        events = [event for held, event in self._held if _overlap(held, rows)]
        self._held = [(held, event) for held, event in self._held if not _overlap(held, rows)]
        return rows, events

    def hold(self, rows: range, event: Event) -> None:
        """Keep these rows unchanged until the event."""
        self._held.append((rows, event))


class StagedSlab(ABC, Generic[Event]):
    """Slots in device memory. `stage` and `publish` run on one thread, gathers on another.

    A subclass allocates pinned staging rows if `num_rows` > 0, and enqueues copies and events on its own fill stream.
    """

    def __init__(self, layout: SlotLayout, num_slots: int, num_rows: int) -> None:
        """The ring has `num_rows` rows, but at most as many as there are slots."""
        self.layout = layout
        self.num_slots = num_slots
        self.num_rows = min(num_rows, num_slots)
        #: Number of publications of each slot; rows derived from older content are computed again.
        self.versions: NDArray[np.uint32] = np.zeros(num_slots, np.uint32)
        self.published: Event | None = None  # the last publication
        self.row_tokens: NDArray[np.uint8] = np.zeros((0, layout.token_bytes), np.uint8)
        self.row_scales: NDArray[np.uint8] = np.zeros((0, layout.scale_bytes), np.uint8)
        self.row_slots: NDArray[np.int32] = np.zeros(0, np.int32)  # the slot that each row is copied to
        self._ring = StagingRing[Event](self.num_rows)

    @abstractmethod
    def _current(self) -> AbstractContextManager[object]:
        """Make the device current on this thread."""

    @abstractmethod
    def _copy_rows(self, rows: range) -> None:
        """Enqueue the copy of adjacent staged rows to the slots in `row_slots`."""

    @abstractmethod
    def _record_event(self) -> Event:
        """Record an event after the copies enqueued so far."""

    def stage(self, slots: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[int]]:
        """Return pinned rows to decode blobs into; waits only for copies of their previous content."""
        with self._current():
            rows, events = self._ring.take(len(slots))
            while events:
                events.pop().synchronize()
        return self.row_tokens, self.row_scales, rows

    def publish(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Enqueue the copies of these rows and return at once."""
        if not slots:
            return
        self.row_slots[list(rows)] = slots
        ranges = adjacent(rows)
        with self._current():
            for adjacent_rows in ranges:
                self._copy_rows(adjacent_rows)
            event = self._record_event()
            for adjacent_rows in ranges:
                self._ring.hold(adjacent_rows, event)
            # The previous event is freed here: pycuda frees nothing on a thread where its context is not current.
            self.published = event
        self.versions[list(slots)] += 1


def adjacent(rows: Sequence[int]) -> list[range]:
    """Return distinct row numbers as the fewest ranges of adjacent numbers, ascending."""
    found: list[range] = []
    for row in sorted(rows):
        if found and found[-1].stop == row:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop

"""The order in which pieces of requests get their turn: by priority, then start-time fair queueing.

Each request is a flow. A piece's tag is where its flow would stand if all flows were served at the same rate, so the
first piece of a small request goes before the eighth piece of a large one, whoever came first. Pure; no clock.
(Goyal, Vin, Cheng: "Start-time Fair Queueing", SIGCOMM 1996.)
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Rank(NamedTuple):
    """Sorts pieces: smaller goes first. The sequence number keeps ties in order of arrival."""

    negative_priority: int
    tag: float
    sequence: int


class FairQueue(Generic[T]):
    """Items by rank; each push says which flow it belongs to and what it costs."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, T]] = []
        self._flow_ends: dict[Hashable, float] = {}
        self._virtual_time = 0.0
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, item: T, *, flow: Hashable, cost: float, priority: int) -> Rank:
        """Enter an item behind those of its own flow and beside those of others."""
        tag = max(self._virtual_time, self._flow_ends.get(flow, 0.0))
        self._flow_ends[flow] = tag + cost
        self._sequence += 1
        rank = Rank(-priority, tag, self._sequence)
        heapq.heappush(self._heap, (rank, item))
        return rank

    def peek(self) -> T:
        """The next item, which stays. Raises `IndexError` when empty."""
        return self._heap[0][1]

    def pop(self) -> T:
        """Remove and return the next item. Raises `IndexError` when empty."""
        rank, item = heapq.heappop(self._heap)
        self._virtual_time = max(self._virtual_time, rank.tag)
        return item

    def end_flow(self, flow: Hashable) -> None:
        """No more pushes for this flow: forget where it stood."""
        self._flow_ends.pop(flow, None)

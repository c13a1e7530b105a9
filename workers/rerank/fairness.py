"""The order in which pieces of requests get their turn: by priority, then start-time fair queueing.

Each request is a flow. A piece's tag is where its flow would stand if all flows were served at the same rate, so the
first piece of a small request goes before the eighth piece of a large one, whoever came first. Pure; no clock.
(Goyal, Vin, Cheng: "Start-time Fair Queueing", SIGCOMM 1996. Virtual time advances with the service given as in
Bennett, Zhang: "Hierarchical Packet Fair Queueing Algorithms", SIGCOMM 1996: by start tags alone it would stand still
under an unbroken run of new small requests, and the large ones among them would starve.)
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

#: However many requests wait, those that come later leave an old one at least this share of the service. With fewer
#: requests than this the order is as fair as can be; far more only wait together in a backlog, where an end to each
#: request's wait is worth more.
SMALLEST_SHARE = 1 / 32


class Rank(NamedTuple):
    """Sorts pieces: smaller goes first. The sequence number keeps ties in order of arrival."""

    negative_priority: int
    tag: float
    sequence: int


class _Entry(NamedTuple, Generic[T]):
    rank: Rank  # no two are equal, so that items are never compared
    cost: float
    flow: Hashable
    item: T


class FairQueue(Generic[T]):
    """Items by rank; each push says which flow it belongs to and what it costs."""

    def __init__(self) -> None:
        self._heap: list[_Entry[T]] = []
        self._num_waiting: Counter[Hashable] = Counter()  # items by flow
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
        heapq.heappush(self._heap, _Entry(rank, cost, flow, item))
        self._num_waiting[flow] += 1
        return rank

    def peek(self) -> T:
        """The next item, which stays. Raises `IndexError` when empty."""
        return self._heap[0].item

    def pop(self) -> T:
        """Remove and return the next item. Raises `IndexError` when empty."""
        rank, cost, flow, item = heapq.heappop(self._heap)
        share = max(SMALLEST_SHARE, 1 / (len(self._num_waiting) + 1))  # one more: the flow that comes next
        self._virtual_time = max(self._virtual_time, rank.tag) + cost * share
        self._num_waiting[flow] -= 1
        if self._num_waiting[flow] == 0:
            del self._num_waiting[flow]
        return item

    def discard(self, is_unwanted: Callable[[T], bool]) -> None:
        """Remove all items of which this is true, as if they had never been pushed."""
        self._heap = [entry for entry in self._heap if not is_unwanted(entry.item)]
        heapq.heapify(self._heap)
        self._num_waiting = Counter(entry.flow for entry in self._heap)

    def end_flow(self, flow: Hashable) -> None:
        """No more pushes for this flow: forget where it stood."""
        self._flow_ends.pop(flow, None)

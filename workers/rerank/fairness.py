"""Orders the pieces of requests: a weighted share for each priority, fair queueing within a priority.

Two levels of start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996). Of the waiting priorities, priority p gets
service in proportion to 1 + p, so higher priorities get more and lower ones never wait for ever. Within a priority,
each request is a flow: the first piece of a small request goes before the eighth piece of a large one, even if the
large one came first. Virtual time within a priority advances with the service given, as in Bennett and Zhang (SIGCOMM
1996). If it advanced with start tags only, an unbroken run of new small requests would starve a large one.
Pure; no clock.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

#: The least share of its priority's service that a request gets, however many later requests wait. With fewer
#: requests than the inverse of this share, the order is exactly fair.
SMALLEST_SHARE = 1 / 32


class _Entry(NamedTuple, Generic[T]):
    tag: float
    sequence: int  # makes entries distinct, so that items are never compared
    cost: float
    flow: int
    item: T


class _Level(Generic[T]):
    """The waiting items of one priority."""

    def __init__(self, priority: int) -> None:
        self.weight = 1 + priority
        self.start = 0.0  # virtual time at which this priority's next item is due
        self.heap: list[_Entry[T]] = []
        self.num_waiting: Counter[int] = Counter()  # items by flow
        self.virtual_time = 0.0

    def pop(self) -> _Entry[T]:
        entry = heapq.heappop(self.heap)
        share = max(SMALLEST_SHARE, 1 / (len(self.num_waiting) + 1))  # + 1 for the flow that arrives next
        self.virtual_time = max(self.virtual_time, entry.tag) + entry.cost * share
        self.num_waiting[entry.flow] -= 1
        if self.num_waiting[entry.flow] == 0:
            del self.num_waiting[entry.flow]
        self.start += entry.cost / self.weight
        return entry


class FairQueue(Generic[T]):
    """A queue of items in fair order; the items of one `push` are one flow and stay in their order."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level[T]] = {}
        self._virtual_time = 0.0
        self._sequence = 0
        self._num_flows = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, items: Sequence[T], costs: Sequence[float], *, priority: int) -> None:
        """Add the items of one request, with the cost of each (> 0)."""
        if not items:
            return
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level(priority)
        if not level.heap:
            level.start = max(self._virtual_time, level.start)
        self._num_flows += 1
        tag = level.virtual_time
        for item, cost in zip(items, costs, strict=True):
            self._sequence += 1
            heapq.heappush(level.heap, _Entry(tag, self._sequence, cost, self._num_flows, item))
            tag += cost
        level.num_waiting[self._num_flows] = len(items)
        self._length += len(items)

    def peek(self) -> T:
        """Return the next item without removing it. Raises `IndexError` when empty."""
        return self._next().heap[0].item

    def pop(self) -> T:
        """Remove and return the next item. Raises `IndexError` when empty."""
        level = self._next()
        self._virtual_time = level.start
        self._length -= 1
        return level.pop().item

    def _next(self) -> _Level[T]:
        waiting = [level for level in self._levels.values() if level.heap]
        if not waiting:
            raise IndexError("the queue is empty")
        return min(waiting, key=lambda level: (level.start, -level.weight))

    def discard(self, is_unwanted: Callable[[T], bool]) -> None:
        """Remove all items for which `is_unwanted` is true, as if they had not been pushed."""
        for level in self._levels.values():
            level.heap = [entry for entry in level.heap if not is_unwanted(entry.item)]
            heapq.heapify(level.heap)
            level.num_waiting = Counter(entry.flow for entry in level.heap)
        self._length = sum(len(level.heap) for level in self._levels.values())

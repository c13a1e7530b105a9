"""The queue between the thread that polls Kafka and the loop: bounded by count and by bytes, safe for both."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable

from workers.ports import Partition, Record

#: Records that wait for the loop before polling pauses; two polls' worth keep the loop busy between polls.
MAX_WAITING_RECORDS = 256
#: The same bound for large records: an image event may carry the whole image.
MAX_WAITING_BYTES = 64 << 20


class Arrivals:
    """Records that have been polled and not taken."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Record] = deque()
        self._num_bytes = 0
        self._held = False

    def put(self, records: Iterable[Record]) -> None:
        """Add records; ignored while the queue is held, because the next owner reads them again."""
        with self._changed:
            if not self._held:
                for record in records:
                    self._waiting.append(record)
                    self._num_bytes += record.num_bytes()

    def take(self) -> Record | None:
        with self._changed:
            if not self._waiting:
                return None
            was_low = self._is_low()
            record = self._waiting.popleft()
            self._num_bytes -= record.num_bytes()
            if self._is_low() and not was_low:
                self._changed.notify_all()
            return record

    def is_full(self) -> bool:
        """Whether polling has to pause."""
        with self._changed:
            return self._held or self._is_full()

    def wait_for_room(self, timeout_s: float, or_else: Callable[[], bool]) -> None:
        """Wait for room or the timeout. The wait also ends when `or_else()` is true after a `notify`."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._held or self._is_full()) or or_else(), timeout_s)

    def pause(self, timeout_s: float, until: Callable[[], bool]) -> None:
        """Wait for the timeout, or until `until()` is true after a `notify`."""
        with self._changed:
            self._changed.wait_for(until, timeout_s)

    def notify(self) -> None:
        """Wake every wait, so that it checks its condition again."""
        with self._changed:
            self._changed.notify_all()

    def drop(self, partitions: Collection[Partition]) -> None:
        """Remove the records of these partitions."""
        with self._changed:
            self._waiting = deque(record for record in self._waiting if record.partition not in partitions)
            self._num_bytes = sum(record.num_bytes() for record in self._waiting)
            self._changed.notify_all()

    def hold(self) -> None:
        """Remove all records and take no more."""
        with self._changed:
            self._held = True
            self._waiting.clear()
            self._num_bytes = 0

    def count(self) -> Counter[Partition]:
        """The number of waiting records by partition."""
        with self._changed:
            return Counter(record.partition for record in self._waiting)

    def _is_low(self) -> bool:
        return len(self._waiting) <= MAX_WAITING_RECORDS // 2 and self._num_bytes <= MAX_WAITING_BYTES // 2

    def _is_full(self) -> bool:
        return len(self._waiting) >= MAX_WAITING_RECORDS or self._num_bytes >= MAX_WAITING_BYTES

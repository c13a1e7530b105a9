"""Records which consumed messages are finished and how far each partition may be committed.

Only an unbroken run of finished messages from the oldest on is released, so that a commit never passes a message
still in work. Offsets may have gaps (compaction, transaction markers); the order is that of arrival. Knows nothing of
Kafka or of the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from workers.ports import Partition, Record

T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    offset: int
    epoch: int
    finished: bool = False
    payload: T | None = None


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """One finished message with no unfinished message before it in its partition."""

    partition: Partition
    offset: int
    payload: T


class Ledger(Generic[T]):
    """Open messages by partition, oldest first; `T` is the payload of a finished message."""

    def __init__(self) -> None:
        self._entries: dict[Partition, deque[_Entry[T]]] = {}
        self._index: dict[tuple[Partition, int], _Entry[T]] = {}

    def begin(self, record: Record) -> None:
        """Enter a message in work. Raises `ValueError` if the message is in work already."""
        partition, offset = key = record.partition, record.offset
        if key in self._index:
            raise ValueError(f"{partition.topic}-{partition.number} offset {offset} is in work already")
        entry: _Entry[T] = _Entry(offset, record.epoch)
        self._entries.setdefault(partition, deque()).append(entry)
        self._index[key] = entry

    def finish(self, record: Record, payload: T) -> bool:
        """Mark a message finished; returns False if it is not in work for this assignment of its partition."""
        entry = self._open(record)
        if entry is None or entry.finished:
            return False
        entry.finished, entry.payload = True, payload
        return True

    def take_done(
        self, limit: int | None = None, is_ready: Callable[[T], bool] = lambda payload: True
    ) -> list[Done[T]]:
        """Remove and return the finished messages with no unfinished or unready message before them."""
        done: list[Done[T]] = []
        for partition in list(self._entries):
            for taken in self._pop_finished(partition, is_ready):
                done.append(taken)
                if limit is not None and len(done) >= limit:
                    return done
        return done

    def _pop_finished(self, partition: Partition, is_ready: Callable[[T], bool]) -> Iterator[Done[T]]:
        entries = self._entries[partition]
        while entries and entries[0].finished and is_ready(entries[0].payload):  # type: ignore[arg-type]
            entry = entries.popleft()
            del self._index[partition, entry.offset]
            if not entries:
                del self._entries[partition]
            yield Done(partition, entry.offset, entry.payload)  # type: ignore[arg-type]  # finished: payload is set

    def forget(self, partitions: Collection[Partition]) -> list[T]:
        """Drop every message of these partitions; return the payloads of the finished ones."""
        dropped = []
        for partition in partitions:
            for entry in self._entries.pop(partition, ()):
                del self._index[partition, entry.offset]
                if entry.finished:
                    dropped.append(entry.payload)
        return dropped  # type: ignore[return-value]  # finished: payload is set

    def is_open(self, record: Record) -> bool:
        """Whether this message is in work, for this assignment of its partition."""
        return self._open(record) is not None

    def _open(self, record: Record) -> _Entry[T] | None:
        entry = self._index.get((record.partition, record.offset))
        return entry if entry is not None and entry.epoch == record.epoch else None

    def num_open(self, partitions: Collection[Partition] | None = None) -> int:
        """Messages entered and not yet taken, in these partitions or in all."""
        if partitions is None:
            return len(self._index)
        return sum(len(self._entries.get(partition, ())) for partition in partitions)


def commit_offsets(done: Collection[Done[T]]) -> dict[Partition, int]:
    """Return the offsets to commit for these messages: one past the last message of each partition."""
    offsets: dict[Partition, int] = {}
    for message in done:
        offsets[message.partition] = max(offsets.get(message.partition, 0), message.offset + 1)
    return offsets

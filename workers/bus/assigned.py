"""The partitions that Kafka has assigned to a member, from their assignment until they are read.

A partition is paused until the loop opens it. All methods but `open` and those that note events run on the thread that
polls. Knows nothing of records.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import kafka.errors as kafka_errors
import structlog
from kafka import KafkaConsumer, TopicPartition

from workers.bus.kafka_internals import committed_offsets, topic_id
from workers.ports import Assignment, Commit, Partition

log = structlog.get_logger(__name__)

#: Timeout of one request for offsets; the next poll repeats the request.
LIMIT_S = 1.0
#: Interval at which the number of unread records is looked up, for people and autoscalers; each costs a small request.
LAG_INTERVAL_S = 1.0


class _State(Enum):
    NEW = auto()  # its offsets have to be looked up
    OFFERED = auto()  # the loop has not opened it
    OPEN = auto()
    CLOSED = auto()  # its topic was created again and the loop has not released it


@dataclass(slots=True)
class _Entry:
    epoch: int
    state: _State = _State.NEW
    assignment: Assignment | None = None
    open_at: int | None = None


class AssignedPartitions:
    """The state of each assigned partition."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer
        self._lock = threading.Lock()
        self._entries: dict[TopicPartition, _Entry] = {}
        self._offers: list[Assignment] = []
        self._epoch = 0
        self.num_assignments = 0
        self._topic_ids: dict[str, str] = {}
        self._lag_due = 0.0
        self.unread: Mapping[Partition, int] = {}  # records after the last poll, at the last lookup

    def add(self, partitions: Collection[TopicPartition]) -> None:
        """Note an assignment, on Kafka's thread."""
        if not partitions:
            return
        with self._lock:
            self.num_assignments += 1
            for partition in partitions:
                self._epoch += 1
                self._entries[partition] = _Entry(self._epoch)
        self._consumer.pause(*partitions)  # now, because the poll that brought the assignment fetches next

    def remove(self, partitions: Collection[TopicPartition]) -> None:
        """Note a revocation, on Kafka's thread."""
        with self._lock:
            for partition in partitions:
                self._entries.pop(partition, None)
            gone = {Partition(*partition) for partition in partitions}
            self._offers = [offer for offer in self._offers if offer.partition not in gone]

    def offers(self) -> list[Assignment]:
        """Return the assignments that the loop has not seen."""
        with self._lock:
            offers, self._offers = self._offers, []
            return offers

    def open(self, assignment: Assignment, offset: int) -> None:
        """Start to read a partition at this offset with the next poll. Called by the loop."""
        with self._lock:
            entry = self._entries.get(TopicPartition(*assignment.partition))
            if entry is not None and entry.assignment is assignment and entry.state is _State.OFFERED:
                entry.open_at = offset

    def is_opening(self) -> bool:
        """Whether a partition waits for its offset lookup or for its opening, which the next poll does."""
        with self._lock:
            return any(entry.state is _State.NEW or entry.open_at is not None for entry in self._entries.values())

    def are_all_open(self) -> bool:
        with self._lock:
            return all(entry.state is _State.OPEN for entry in self._entries.values())

    def epoch_of(self, partition: TopicPartition) -> int | None:
        """The epoch of an open partition, None for any other."""
        with self._lock:
            entry = self._entries.get(partition)
            return entry.epoch if entry is not None and entry.state is _State.OPEN else None

    def pause(self, *, all_of_them: bool) -> None:
        """Pause the partitions that are not open, or all, and resume the others."""
        assigned = self._consumer.assignment()
        with self._lock:
            is_open = {p for p, entry in self._entries.items() if entry.state is _State.OPEN}
        wanted = assigned if all_of_them else assigned - is_open
        paused = self._consumer.paused()
        if wanted - paused:
            self._consumer.pause(*(wanted - paused))
        if (paused & assigned) - wanted:
            self._consumer.resume(*((paused & assigned) - wanted))

    def turn(self, wake: Callable[[], None]) -> None:
        """Look up the offsets of new partitions, and resume those that the loop has opened. Raises Kafka's errors."""
        assigned = self._consumer.assignment()
        with self._lock:
            to_open = [(p, entry) for p, entry in self._entries.items() if entry.open_at is not None and p in assigned]
            new = [p for p, entry in self._entries.items() if entry.state is _State.NEW and p in assigned]
        for partition, entry in to_open:
            self._consumer.seek(partition, entry.open_at)
            with self._lock:
                entry.state, entry.open_at = _State.OPEN, None
        if new:
            self._offer(new)
            wake()

    def _offer(self, partitions: Collection[TopicPartition]) -> None:
        try:
            committed = committed_offsets(self._consumer, partitions, LIMIT_S)
            beginnings = self._consumer.beginning_offsets(partitions, timeout_ms=int(LIMIT_S * 1000))
            ends = self._consumer.end_offsets(partitions, timeout_ms=int(LIMIT_S * 1000))
        except kafka_errors.KafkaTimeoutError:
            return  # the next poll asks again
        with self._lock:
            for partition in partitions:
                entry = self._entries.get(partition)
                if entry is None or entry.state is not _State.NEW:
                    continue
                found = committed.get(partition)
                self._topic_ids[partition.topic] = topic_id(self._consumer, partition.topic)
                entry.state = _State.OFFERED
                entry.assignment = Assignment(
                    partition=Partition(*partition),
                    committed=None if found is None or found.offset < 0 else Commit(found.offset, found.metadata or ""),
                    beginning=beginnings[partition],
                    end=ends[partition],
                    topic_id=self._topic_ids[partition.topic],
                    epoch=entry.epoch,
                )
                self._offers.append(entry.assignment)

    def close_recreated(self) -> frozenset[TopicPartition]:
        """Close and return the partitions of topics that were deleted and created again since the last call."""
        closed = set()
        with self._lock:
            for topic in {partition.topic for partition in self._entries}:
                known, current = self._topic_ids.get(topic), topic_id(self._consumer, topic)
                if current and known and current != known:
                    log.warning(
                        "the topic was deleted and created again; reading begins at its oldest record", topic=topic
                    )
                    closed |= {partition for partition in self._entries if partition.topic == topic}
                if current:
                    self._topic_ids[topic] = current
            for partition in closed:
                self._entries[partition].state = _State.CLOSED
        return frozenset(closed)

    def reopen(self, partitions: Collection[TopicPartition]) -> None:
        """Offer closed partitions again: the loop has released them."""
        with self._lock:
            for partition in partitions:
                if partition in self._entries:
                    self._epoch += 1
                    self._entries[partition] = _Entry(self._epoch)

    def look_up_lag(self) -> bool:
        """Look up the number of unread records, once per interval; False if it is not due.

        Asks the broker, because fetches report no lag for paused partitions, which is when work piles up.
        """
        if time.monotonic() < self._lag_due:
            return False
        self._lag_due = time.monotonic() + LAG_INTERVAL_S
        assigned = self._consumer.assignment()
        try:
            ends = self._consumer.end_offsets(assigned, timeout_ms=int(LIMIT_S * 1000)) if assigned else {}
        except kafka_errors.KafkaTimeoutError:
            return True  # the last result stays valid
        unread = {}
        for partition, end in ends.items():
            position = self._consumer.position(partition, timeout_ms=0)
            if position is not None:
                unread[Partition(*partition)] = max(0, end - position)
        self.unread = unread
        return True

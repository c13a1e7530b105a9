"""The in-memory twin of Kafka: a broker, an inbox, a follower and outboxes with the same contracts, without a network.

For unit tests and for trying a job without a broker. One process, no threads; a message is readable as soon as it is
sent.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from workers.errors import Refused, TooLarge, TopicRefused, Transient
from workers.ports import Assignment, Commit, Gap, Outgoing, Partition, Record, Revocation


class MemoryBroker:
    """Topics as lists of records, and the offsets that groups have committed."""

    def __init__(
        self, *, num_partitions: int = 1, max_message_bytes: int = 1 << 20, refused_topics: Collection[str] = ()
    ) -> None:
        """`refused_topics` do not exist or may not be written to."""
        self.num_partitions = num_partitions
        self.max_message_bytes = max_message_bytes
        self.refused_topics = frozenset(refused_topics)
        #: While True, every send, publish and commit fails with `Transient`.
        self.away = False
        self.committed: dict[tuple[str, Partition], Commit] = {}
        self._logs: dict[Partition, list[Record]] = {}
        self._wakes: list[Callable[[], None]] = []

    def log(self, topic: str) -> list[Record]:
        """Return every record of a topic, partition by partition."""
        return [record for number in range(self.num_partitions) for record in self.partition_log(topic, number)]

    def partition_log(self, topic: str, number: int) -> list[Record]:
        return self._logs.setdefault(Partition(topic, number), [])

    def on_append(self, wake: Callable[[], None]) -> None:
        self._wakes.append(wake)

    def check(self, message: Outgoing) -> None:
        """Raise the error of a broker that refuses this message or is away."""
        if self.away:
            raise Transient("the broker is away")
        if message.topic in self.refused_topics:
            raise TopicRefused(f"the broker accepts no message for the topic {message.topic}")
        if message.partition is not None and not 0 <= message.partition < self.num_partitions:
            raise TopicRefused(f"the topic {message.topic} has no partition {message.partition}")
        size = message.num_bytes()
        if size > self.max_message_bytes:
            raise TooLarge(f"{size} bytes; the broker accepts {self.max_message_bytes}")

    def append(self, message: Outgoing) -> Record:
        by_key = zlib.crc32(message.key or b"") % self.num_partitions
        number = by_key if message.partition is None else message.partition
        log = self.partition_log(message.topic, number)
        record = Record(
            partition=Partition(message.topic, number),
            offset=len(log),
            key=message.key,
            value=message.value,
            headers=message.headers,
            timestamp_ms=int(time.time() * 1000),
        )
        log.append(record)
        for wake in self._wakes:
            wake()
        return record


class MemoryInbox:
    """Reads the partitions it is given once they are opened; implements `workers.ports.Inbox`."""

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        topic: str,
        group_id: str,
        wake: Callable[[], None] = lambda: None,
        partitions: Collection[int] | None = None,
    ) -> None:
        self._broker = broker
        self._group_id = group_id
        self._topic = topic
        self._positions: dict[Partition, int] = {}
        self._assigned: dict[Partition, Assignment] = {}
        self._assignments: list[Assignment] = []
        self._epoch = 0
        self._revocations: list[Revocation] = []
        self._held = False
        broker.on_append(wake)
        self.gain(range(broker.num_partitions) if partitions is None else partitions)

    def gain(self, numbers: Collection[int]) -> None:
        """Assign these partitions, as after a rebalance."""
        for number in numbers:
            partition = Partition(self._topic, number)
            committed = self._broker.committed.get((self._group_id, partition))
            end = len(self._broker.partition_log(*partition))
            self._epoch += 1
            self._assigned[partition] = Assignment(partition, committed, 0, end, self._topic, self._epoch)
            self._assignments.append(self._assigned[partition])

    def lose(self, numbers: Collection[int], *, lost: bool = False) -> None:
        """Revoke these partitions; `lost` means that another member owns them already."""
        partitions = frozenset(Partition(self._topic, number) for number in numbers)
        for partition in partitions:
            del self._assigned[partition]
            self._positions.pop(partition, None)
        self._assignments = [assignment for assignment in self._assignments if assignment.partition not in partitions]
        self._revocations.append(Revocation(partitions, lost, lambda: None))

    def hold(self) -> None:
        self._held = True

    def take(self) -> Record | None:
        if self._held:
            return None
        for partition, position in self._positions.items():
            log = self._broker.partition_log(*partition)
            if position < len(log):
                self._positions[partition] = position + 1
                return replace(log[position], epoch=self._assigned[partition].epoch)
        return None

    def assignments(self) -> list[Assignment]:
        assignments, self._assignments = self._assignments, []
        return assignments

    def open(self, assignment: Assignment, offset: int) -> None:
        if self._assigned.get(assignment.partition) is assignment:
            self._positions[assignment.partition] = offset

    def revocations(self) -> list[Revocation]:
        revocations, self._revocations = self._revocations, []
        return revocations

    def commit(self, offsets: Mapping[Partition, Commit]) -> Future[None]:
        committed: Future[None] = Future()
        if self._broker.away:
            committed.set_exception(Transient("the broker is away"))
        else:
            self._broker.committed.update({(self._group_id, p): commit for p, commit in offsets.items()})
            committed.set_result(None)
        return committed

    def joined(self) -> bool:
        return True

    def assigned(self) -> frozenset[Partition]:
        return frozenset(self._assigned)

    def lag(self) -> Mapping[Partition, int]:
        lag = {}
        for partition, assignment in self._assigned.items():
            unopened = 0 if assignment.committed is None else assignment.committed.offset
            position = self._positions.get(partition, unopened)
            lag[partition] = len(self._broker.partition_log(*partition)) - position
        return lag

    def close(self, timeout_s: float) -> None:
        self._assigned.clear()
        self._positions.clear()


class MemoryFollower:
    """Reads the records appended to a topic after its creation; implements `workers.ports.Follower`."""

    def __init__(
        self,
        broker: MemoryBroker,
        topic: str,
        *,
        wake: Callable[[], None] = lambda: None,
        partitions: Collection[int] | None = None,
    ) -> None:
        self._broker = broker
        self._positions = {
            Partition(topic, number): len(broker.partition_log(topic, number))
            for number in (range(broker.num_partitions) if partitions is None else partitions)
        }
        self._gaps: deque[Gap] = deque()
        self._wake = wake
        broker.on_append(wake)

    def lose(self, number: int, reason: str = "records were removed") -> None:
        """Drop the records of a partition that have not been taken, and report a gap."""
        for partition in self._positions:
            if partition.number == number:
                self._positions[partition] = len(self._broker.partition_log(*partition))
                self._gaps.append(Gap(partition, reason))
        self._wake()

    def take(self) -> Record | Gap | None:
        if self._gaps:
            return self._gaps.popleft()
        for partition, position in self._positions.items():
            log = self._broker.partition_log(*partition)
            if position < len(log):
                self._positions[partition] = position + 1
                return log[position]
        return None

    def close(self, timeout_s: float) -> None:
        self._positions.clear()


class MemoryOutbox:
    """Implements `workers.ports.Outbox`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    def send(self, message: Outgoing) -> Future[None]:
        sent: Future[None] = Future()
        try:
            self._broker.check(message)
        except (Refused, Transient) as error:
            sent.set_exception(error)
        else:
            self._broker.append(message)
            sent.set_result(None)
        return sent

    def close(self, timeout_s: float) -> None:
        """Nothing is held open."""


class MemoryTransactionalOutbox:
    """Implements `workers.ports.TransactionalOutbox`."""

    def __init__(self, broker: MemoryBroker, *, group_id: str) -> None:
        self._broker = broker
        self._group_id = group_id

    def is_decided(self, topic: str) -> bool:
        return True

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, Commit]) -> None:
        for number, message in enumerate(messages):
            try:
                self._broker.check(message)
            except Refused as error:
                error.message_number = number
                raise
        if self._broker.away:
            raise Transient("the broker is away")
        for message in messages:
            self._broker.append(message)
        self._broker.committed.update({(self._group_id, p): commit for p, commit in offsets.items()})

    def close(self, timeout_s: float) -> None:
        """Nothing is held open."""

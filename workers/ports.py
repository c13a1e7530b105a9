"""The ports of a worker: small Protocols between the code that decides and the code that touches the network.

Each port of the bus and the store has an adapter (`workers.bus`, `workers.store`) and an in-memory twin; one contract
suite tests both. Imports no client.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from workers.errors import Poison, Refused

Headers = tuple[tuple[str, bytes], ...]


class Interval(NamedTuple):
    """A time interval by the loop's clock, in seconds."""

    started_at: float
    ended_at: float

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


class Partition(NamedTuple):
    """One partition of one topic."""

    topic: str
    number: int


class SpanIds(NamedTuple):
    """The identity of a span within its trace."""

    trace_id: int
    span_id: int
    parent_id: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Poll:
    """The poll that returned some records; times are by the loop's clock."""

    interval: Interval
    num_records: int


@dataclass(frozen=True, slots=True)
class Record:
    """One consumed message. A `value` of None is a tombstone; an empty value is not.

    `epoch` numbers the assignments of the partition; an outcome from an earlier assignment has no effect.
    """

    partition: Partition
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int
    poll: Poll | None = field(default=None, compare=False)  # None for the in-memory twin, which polls nothing
    epoch: int = 0

    def polled_at(self, taken_at: float) -> float:
        """Return the end of the poll that returned the record, or `taken_at` if that is earlier."""
        return taken_at if self.poll is None else min(self.poll.interval.ended_at, taken_at)

    def num_bytes(self) -> int:
        """The bytes of key, value and headers."""
        headers = sum(len(name) + len(value) for name, value in self.headers)
        return len(self.key or b"") + len(self.value or b"") + headers


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish. A `value` of None is a tombstone; an empty value is not.

    `partition` is a number within the topic; None lets the key decide.
    `if_refused` returns the message to publish when the broker refuses this one, or None.
    `span` identifies the span of the sending, which the trace headers name too.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None
    if_refused: Callable[[Refused], Outgoing | None] | None = None
    span: SpanIds | None = None

    def num_bytes(self) -> int:
        """The bytes of key and value."""
        return len(self.key or b"") + len(self.value or b"")

    def instead(self, refused: Refused) -> Outgoing | None:
        """Return the message that replaces this one, None if there is no replacement."""
        return None if self.if_refused is None else self.if_refused(refused)


@dataclass(frozen=True, slots=True)
class Finished:
    """The one outcome of a record: the messages to publish before its offset may be committed.

    `span` is the span of the record's processing, None if it is not sampled.
    """

    record: Record
    messages: tuple[Outgoing, ...]
    span: SpanIds | None = None


class Job(Protocol):
    """The work of one kind of worker, called from the loop's thread only.

    A job decides and computes; it neither publishes nor commits. Whatever takes time (a fetch, a batch on the engine)
    runs on other threads, which wake the loop (`workers.landing`).
    """

    def has_room(self) -> bool:
        """Whether another batch of records may be accepted; False pauses reading."""
        ...

    def accept(self, record: Record, now: float) -> None:
        """Start work on a record. If this raises, the loop calls `refuse`."""
        ...

    def refuse(self, record: Record, error: Poison, now: float) -> None:
        """Give a record the outcome of this error, and forget any work that `accept` began on it."""
        ...

    def turn(self, now: float) -> list[Finished]:
        """Advance all work that can advance without waiting, and return the finished records with their outcomes."""
        ...

    def wants_turn_in_s(self, now: float) -> float | None:
        """Return the seconds until the next time-based step (a batch's wait, a deadline), None if there is none."""
        ...

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget the unfinished records of these partitions: another worker owns them now."""
        ...

    def num_active(self) -> int:
        """Records accepted and not yet finished."""
        ...


class Commit(NamedTuple):
    """A committed offset: every earlier record is done. `metadata` is text that the broker keeps with it."""

    offset: int
    metadata: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A partition that is assigned to this worker and not read until `Inbox.open`."""

    partition: Partition
    committed: Commit | None
    beginning: int  # offset of the oldest record
    end: int  # one past the newest record
    topic_id: str = ""  # changes when a topic is deleted and created again; "" if the broker reports no id
    epoch: int = 0  # equals the `epoch` of the assignment's records


@dataclass(frozen=True, slots=True)
class Revocation:
    """Partitions that another worker is about to own or, if `lost`, owns already.

    Until `release` is called the group waits; unless `lost`, offsets of these partitions can still be committed.
    """

    partitions: frozenset[Partition]
    lost: bool
    release: Callable[[], None]


class Inbox(Protocol):
    """The consuming side of the bus, as a member of a group. Owns a thread; `take` raises the thread's error."""

    def take(self) -> Record | None:
        """Return the next arrived record without waiting, else None. The inbox pauses while nothing is taken."""
        ...

    def revocations(self) -> list[Revocation]:
        """Return the revocations since the last call."""
        ...

    def assignments(self) -> list[Assignment]:
        """Return the assignments since the last call."""
        ...

    def open(self, assignment: Assignment, offset: int) -> None:
        """Begin to read an assigned partition at this offset; no effect if the assignment is over."""
        ...

    def commit(self, offsets: Mapping[Partition, Commit]) -> Future[None]:
        """Commit offsets, in the order of the calls. The future fails with `Transient` if the commit fails."""
        ...

    def joined(self) -> bool:
        """Whether this member has received its first assignment, which may be empty."""
        ...

    def assigned(self) -> frozenset[Partition]:
        """The partitions that are assigned to this worker."""
        ...

    def lag(self) -> Mapping[Partition, int]:
        """The number of messages in each assigned partition after the last one taken."""
        ...

    def hold(self) -> None:
        """Stop reading and join no new rebalance, so that records in work can be committed until `close`.

        Other members wait in a rebalance until this one has left.
        """
        ...

    def close(self, timeout_s: float) -> None:
        """Leave the group and end the thread."""
        ...


@dataclass(frozen=True, slots=True)
class Gap:
    """Notes that a follower may have missed records of a partition, and why."""

    partition: Partition
    reason: str


class Follower(Protocol):
    """Reads new records of a topic, from the end of each partition on, without a group.

    The end is fixed when the follower is made. A partition that is created later is read from its beginning.
    Owns a thread; `take` raises the thread's error.
    """

    def take(self) -> Record | Gap | None:
        """Return the next arrived record or gap without waiting, else None."""
        ...

    def close(self, timeout_s: float) -> None: ...


class Outbox(Protocol):
    """The publishing side of the bus."""

    def send(self, message: Outgoing) -> Future[None]:
        """Publish a message. The future ends when the broker has it, or fails with `Refused` or `Transient`."""
        ...

    def close(self, timeout_s: float) -> None: ...


class TransactionalOutbox(Protocol):
    """Publishes messages, and the offsets of the records that they answer, in one transaction."""

    def is_decided(self, topic: str) -> bool:
        """Whether messages to this topic can be published or refused without waiting; if not, starts a lookup."""
        ...

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, Commit]) -> None:
        """Publish all or nothing; blocks until the broker has decided.

        Publishes nothing if it raises. `Refused.message_number` is the index of the refused message. After `Transient`
        publish the same messages, or some of them, again; it is also raised during a rebalance, which a revocation
        then reports.
        """
        ...

    def close(self, timeout_s: float) -> None: ...


class TokenStore(Protocol):
    """Values by key: token blobs and thumbnails, each with the source position of its event."""

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return one value or None per key, in order. Raises `Transient` until the store answers."""
        ...

    def put_many(self, values: Mapping[str, bytes], *, lifetime_s: float | None = None) -> list[bool]:
        """Write each value unless the store holds a value of a later event; return which were written.

        Comparison and write are one step for each key (`protocols.source_position.may_replace`). One round trip where
        the store allows it. Raises `Transient`; writing is idempotent.
        """
        ...

    def probe(self, prefixes: Sequence[str], *, writes: bool) -> None:
        """Try every command that the worker needs on keys with these prefixes; writing commands only with `writes`.

        Raises `Misconfigured` if a person has to correct something, `Transient` while the store cannot be reached.
        """
        ...

    def close(self) -> None: ...

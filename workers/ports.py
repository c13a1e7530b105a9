"""The seams of a worker: small Protocols between what decides and what touches the network.

Each has an adapter (`bus.py`, `store.py`) and an in-memory twin (`memory.py`); one contract suite tests both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from workers.errors import Misconfigured, Refused, TooLarge
from workers.interval import Interval

Headers = tuple[tuple[str, bytes], ...]


class Partition(NamedTuple):
    """One partition of one topic."""

    topic: str
    number: int


class SpanIds(NamedTuple):
    """Where a span stands in its trace."""

    trace_id: int
    span_id: int
    parent_id: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Poll:
    """The poll that brought some records; its times are in the loop's clock."""

    interval: Interval
    num_records: int


@dataclass(frozen=True, slots=True)
class Record:
    """One consumed message."""

    partition: Partition
    offset: int
    key: bytes | None
    value: bytes
    headers: Headers
    timestamp_ms: int
    poll: Poll | None = field(
        default=None, compare=False
    )  # None where nothing was polled: the in-memory twin has records at once

    def polled_at(self, taken_at: float) -> float:
        """When it was there to be taken; at the latest when it was."""
        return taken_at if self.poll is None else min(self.poll.interval.ended_at, taken_at)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish.

    `if_refused` makes the message that is published instead where the broker refuses this one, or None.
    `span` is the span that its headers name, where its sending is recorded.
    """

    topic: str
    key: bytes | None
    value: bytes
    headers: Headers = ()
    if_refused: Callable[[Refused], Outgoing | None] | None = None
    span: SpanIds | None = None

    def instead(self, refused: Refused) -> Outgoing:
        """The message to publish in place of this one. Raises `Misconfigured` where there is none."""
        message = self.if_refused(refused) if self.if_refused is not None else None
        if message is None:
            remedy = (
                "raise the topic's max.message.bytes"
                if isinstance(refused, TooLarge)
                else "create the topic, or let this worker describe it and write to it"
            )
            raise Misconfigured(f"what goes to the topic {self.topic} cannot be published: {refused}; {remedy}")
        return message


@dataclass(frozen=True, slots=True)
class Revocation:
    """Partitions that are about to be, or already are, another worker's.

    `release` lets the group go on; until then the offsets of these partitions can still be committed
    (unless `lost`: then somebody else owns them already).
    """

    partitions: frozenset[Partition]
    lost: bool
    release: Callable[[], None]


class Inbox(Protocol):
    """The consuming side of the bus, as a member of a group. Owns a thread, whose error `take` raises."""

    def take(self) -> Record | None:
        """Return the next record that has arrived, without waiting. Not taking is how a worker holds the bus back."""
        ...

    def revocations(self) -> list[Revocation]:
        """Return the revocations since the last call."""
        ...

    def commit(self, offsets: Mapping[Partition, int]) -> Future[None]:
        """Record that everything before these offsets is done. Fails with `Transient` if it was not recorded."""
        ...

    def joined(self) -> bool:
        """Whether this member has been given its share of the partitions, which may be none, at least once."""
        ...

    def assigned(self) -> frozenset[Partition]:
        """The partitions that are this worker's now."""
        ...

    def lag(self) -> Mapping[Partition, int]:
        """How many messages each assigned partition holds beyond the last one taken."""
        ...

    def hold(self) -> None:
        """Take part in no rebalance that has not begun, so that what is in work can be committed until `close`.

        No more records arrive. Other members wait with a rebalance until this one has left.
        """
        ...

    def close(self, timeout_s: float) -> None:
        """Leave the group and end the thread."""
        ...


class Outbox(Protocol):
    """The publishing side of the bus."""

    def send(self, message: Outgoing) -> Future[None]:
        """Publish; the future is done when the broker has it, or fails with `Refused` or `Transient`."""
        ...

    def close(self, timeout_s: float) -> None: ...


class TransactionalOutbox(Protocol):
    """Publishes messages and the offsets they answer as one."""

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int]) -> None:
        """All or nothing; blocks until the broker has decided.

        Raises, with nothing published: `Refused` (its `message_number` says which message) or `Transient` (try again;
        also when a rebalance is under way, which a revocation then explains).
        """
        ...

    def close(self, timeout_s: float) -> None: ...


class TokenStore(Protocol):
    """Token blobs by key."""

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """One value or None per key, in order. Raises `Transient` when the store cannot be reached."""
        ...

    def put_many(self, blobs: Mapping[str, bytes]) -> None:
        """Write all, in one round trip where the store allows it. Raises `Transient`; writing twice is harmless."""
        ...

    def ping(self) -> None:
        """Raise `Transient` or `Misconfigured` unless the store answers."""
        ...

    def close(self) -> None: ...

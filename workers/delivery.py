"""The port between the loop and a delivery promise, and the code that both promises share.

A delivery turns finished records into published messages and committed offsets: `workers.at_least_once` or
`workers.exactly_once`. Knows no Kafka; time is an argument.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import structlog

from workers.errors import Refused, TooLarge
from workers.ports import Finished, Outgoing, Partition, Record, SpanIds
from workers.retrying import is_worth_a_line
from workers.telemetry.trace_context import trace_id_of

log = structlog.get_logger(__name__)


class DeliveryMetrics(Protocol):
    """Counters that a delivery increments."""

    def count_commit(self) -> None: ...

    def count_retry(self, kind: Literal["publish", "commit"]) -> None: ...

    def observe_publish(self, seconds: float, span: SpanIds | None) -> None:
        """Observe the time from a record's outcome until the broker has its messages; `span` is the processing span."""
        ...


class Delivery(Protocol):
    """Publishes the one outcome of each record and commits the record's offset."""

    def has_room(self) -> bool:
        """Whether more records may be taken; False while too many outcomes wait for the broker."""
        ...

    def begin(self, record: Record) -> None:
        """Note that work on a record has begun."""
        ...

    def finish(self, finished: Finished, now: float) -> None:
        """Accept the outcome of a record in work."""
        ...

    def turn(self, now: float) -> None:
        """Do all publishing, retries and commits that are due."""
        ...

    def wants_turn_in_s(self, now: float) -> float | None:
        """Seconds until time alone changes something, None if nothing is due."""
        ...

    def settled(self, partitions: Collection[Partition] | None = None) -> bool:
        """Whether no record of these partitions (None: of all) is in work, unpublished or uncommitted."""
        ...

    def committing(self) -> Collection[Partition]:
        """The partitions whose commit is under way."""
        ...

    def hurry(self) -> None:
        """Commit all that can be committed in the next turn instead of at the next interval."""
        ...

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget the records of these partitions: another worker owns them."""
        ...


@dataclass(frozen=True, slots=True)
class UndeliveredLimits:
    """Limits on the messages, and their bytes, that may wait for the broker before reading pauses."""

    max_messages: int = 10_000
    max_bytes: int = 64 << 20


class Undelivered:
    """Counts the messages that wait for the broker."""

    def __init__(self, limits: UndeliveredLimits) -> None:
        self._limits = limits
        self.num_messages = 0
        self.num_bytes = 0

    def add(self, messages: Iterable[Outgoing]) -> None:
        for message in messages:
            self.num_messages += 1
            self.num_bytes += message.num_bytes()

    def remove(self, messages: Iterable[Outgoing]) -> None:
        for message in messages:
            self.num_messages -= 1
            self.num_bytes -= message.num_bytes()

    def has_room(self) -> bool:
        return self.num_messages < self._limits.max_messages and self.num_bytes < self._limits.max_bytes


def log_failed(message: Outgoing, attempt: int, error: Exception) -> None:
    """Log an attempt to publish a message that failed and will be repeated."""
    if not is_worth_a_line(attempt):
        return
    if isinstance(error, Refused):
        remedy = (
            "raise the topic's max.message.bytes"
            if isinstance(error, TooLarge)
            else "create the topic, and allow this worker to describe it and to write to it"
        )
        log.error("message refused, trying again", **_ids(message), attempt=attempt, error=str(error), remedy=remedy)
    else:
        log.warning("message not published, trying again", **_ids(message), attempt=attempt, error=str(error))


def _ids(message: Outgoing) -> dict[str, object]:
    key = None if message.key is None else message.key.decode("utf-8", "replace")
    return {"topic": message.topic, "key": key, "trace_id": trace_id_of(message.headers)}

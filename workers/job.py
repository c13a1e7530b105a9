"""What the loop asks of a job: take records, advance, hand back what is finished.

A job decides and computes; it neither publishes nor commits. Everything it waits for (a fetch, a batch on the engine)
runs elsewhere and calls the `wake` it was given; the job itself is only ever called from the loop's thread.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from workers.ports import Outgoing, Partition, Record, SpanIds


@dataclass(frozen=True, slots=True)
class Finished:
    """The one outcome of a record: the messages to publish before its offset may be committed.

    `span` is that of its processing, where that is recorded.
    """

    record: Record
    messages: tuple[Outgoing, ...]
    span: SpanIds | None = None


class Job(Protocol):
    """The work of one kind of worker."""

    def has_room(self) -> bool:
        """Whether another batch of records may be accepted; False holds the bus back."""
        ...

    def accept(self, record: Record, now: float) -> None:
        """Take a record. Whatever is wrong with it becomes its outcome; nothing is raised for a bad message."""
        ...

    def turn(self, now: float) -> list[Finished]:
        """Advance everything that can advance without waiting and return the records that have their outcome."""
        ...

    def wants_turn_in_s(self, now: float) -> float | None:
        """Seconds until time alone would change something (a batch's wait, a deadline), None if nothing would."""
        ...

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget the unfinished records of these partitions: they are another worker's now."""
        ...

    def num_active(self) -> int:
        """Records accepted and not yet finished."""
        ...

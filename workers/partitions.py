"""Opens and closes the partitions assigned to a worker, and finds a message that crashes the process.

No `except` catches a crash. So the metadata of each committed offset counts how often work began at that
offset. If work on a partition began and ended twice without progress, the worker takes the partition's
next messages one at a time, and before each one commits that it is begun alone. If the process dies then, the next
owner of the partition knows which message crashes it. An orderly end resets the counts.

Knows the inbox by its port; time is an argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple

import structlog

from workers.errors import Transient
from workers.landing import Landing
from workers.ports import Assignment, Commit, Inbox, Partition, Record
from workers.retrying import pause_s

log = structlog.get_logger(__name__)

#: Ends without progress after which messages are taken one at a time: the first may be chance, a second is a pattern.
MAX_FAILED_STARTS = 2
#: Messages taken one at a time: about as many as a worker has in work. Later deaths extend the search.
MAX_SUSPECTS = 256
_METADATA = re.compile(r"edje starts=(\d{1,9}) alone=(\d{1,9}) topic=(\S*)")

#: How to handle a record: with others, alone, or not at all because the process died while handling it alone.
Verdict = Literal["free", "suspect", "culprit"]


class Marker(NamedTuple):
    """The metadata of a committed offset: how often work began there, and how often with the next message alone."""

    starts: int = 0
    alone: int = 0
    topic_id: str = ""

    @classmethod
    def parse(cls, metadata: str) -> Marker:
        """Return the marker in the metadata; metadata of other programs counts as absent."""
        match = _METADATA.fullmatch(metadata)
        return cls() if match is None else cls(int(match[1]), int(match[2]), match[3])

    def __str__(self) -> str:
        return f"edje starts={self.starts} alone={self.alone} topic={self.topic_id}"


def first_offset(assignment: Assignment) -> int:
    """Return the offset at which to begin: the committed one, unless the partition has changed since.

    Reading begins at the oldest record if there is no committed offset, if it belongs to a topic that was deleted and
    created again, or if the broker has removed the records after it. If the broker has lost records, reading begins at
    the end.
    """
    committed = assignment.committed
    if committed is None:
        return assignment.beginning
    topic_id = Marker.parse(committed.metadata).topic_id
    if topic_id and assignment.topic_id and topic_id != assignment.topic_id:
        return assignment.beginning
    if committed.offset > assignment.end:
        return assignment.end if topic_id else assignment.beginning
    return max(committed.offset, assignment.beginning)


@dataclass(slots=True)
class _Owned:
    """An assigned partition."""

    assignment: Assignment
    committed: int  # the last committed offset
    marker: Marker  # the marker committed with it
    left: Marker  # the marker to commit at an orderly end
    suspects_end: int  # records before this offset are taken one at a time; 0: no record is
    num_attempts: int = 0


class Partitions:
    """The assigned partitions of one worker."""

    def __init__(self, inbox: Inbox, wake: Callable[[], None]) -> None:
        self._inbox = inbox
        self._landing = Landing(wake)
        self._owned: dict[Partition, _Owned] = {}
        self._due: list[tuple[float, _Owned]] = []  # partitions to open, with the time
        self._now = 0.0

    def turn(self, now: float) -> None:
        """Commit that work begins on the assigned partitions, then open them."""
        self._now = now
        for assignment in self._inbox.assignments():
            self._assign(assignment)
        due = [owned for at, owned in self._due if at <= now]
        if due:
            self._due = [(at, owned) for at, owned in self._due if at > now]
            self._begin([owned for owned in due if self._owned.get(owned.assignment.partition) is owned])
        self._landing.turn()

    def wants_turn_in_s(self, now: float) -> float | None:
        return max(0.0, min(at for at, _ in self._due) - now) if self._due else None

    def _assign(self, assignment: Assignment) -> None:
        partition, committed = assignment.partition, assignment.committed
        offset, marker = first_offset(assignment), Marker()
        if committed is not None and committed.offset == offset:
            marker = Marker.parse(committed.metadata)
        elif committed is not None:
            log.warning("the committed offset is no longer valid", **_ids(partition), committed=committed.offset)
        has_failed = marker.alone > 0 or marker.starts >= MAX_FAILED_STARTS
        num_suspects = min(assignment.end - offset, MAX_SUSPECTS) if has_failed else 0
        if num_suspects > 0:
            log.warning(
                "the process has died here before: messages are taken one at a time",
                **_ids(partition),
                offset=offset,
                starts=marker.starts,
                num_suspects=num_suspects,
            )
        begun = Marker(marker.starts + 1, marker.alone, assignment.topic_id)
        left = marker._replace(topic_id=assignment.topic_id)
        owned = _Owned(assignment, offset, begun, left, offset + num_suspects if num_suspects > 0 else 0)
        self._owned[partition] = owned
        self._due.append((self._now, owned))

    def _begin(self, due: Collection[_Owned]) -> None:
        if not due:
            return
        commits = {owned.assignment.partition: Commit(owned.committed, str(owned.marker)) for owned in due}
        self._landing.watch(
            self._inbox.commit(commits), lambda _: self._open(due), lambda error: self._begin_later(due, error)
        )

    def _open(self, due: Collection[_Owned]) -> None:
        for owned in due:
            if self._owned.get(owned.assignment.partition) is owned:
                self._inbox.open(owned.assignment, owned.committed)

    def _begin_later(self, due: Collection[_Owned], error: Exception) -> None:
        if not isinstance(error, Transient):
            raise error
        for owned in due:
            owned.num_attempts += 1
            self._due.append((self._now + pause_s(owned.num_attempts), owned))

    def commits(self, offsets: Mapping[Partition, int]) -> dict[Partition, Commit]:
        """Return the commits of these offsets, with markers that record the progress."""
        return {
            partition: Commit(offset, str(Marker(1, 0, self._topic_id(partition))))
            for partition, offset in offsets.items()
        }

    def committed(self, offsets: Mapping[Partition, int]) -> None:
        """Note that these offsets have been committed."""
        for partition, offset in offsets.items():
            owned = self._owned.get(partition)
            if owned is not None:
                owned.committed = offset
                owned.marker, owned.left = (Marker(starts, 0, owned.assignment.topic_id) for starts in (1, 0))

    def _topic_id(self, partition: Partition) -> str:
        owned = self._owned.get(partition)
        return "" if owned is None else owned.assignment.topic_id

    def are_suspect(self) -> bool:
        """Whether records have to be taken one at a time, with nothing else in work."""
        return any(owned.suspects_end for owned in self._owned.values())

    def verdict(self, record: Record) -> Verdict:
        """Return how to handle a record that has been taken."""
        owned = self._owned.get(record.partition)
        if owned is None or record.offset >= owned.suspects_end:
            if owned is not None:
                owned.suspects_end = 0
            return "free"
        return "culprit" if owned.marker.alone and record.offset == owned.committed else "suspect"

    def clear_exhausted(self) -> None:
        """Stop suspecting partitions without further records: compaction may have removed the last suspects."""
        lag = self._inbox.lag()
        for partition, owned in self._owned.items():
            if owned.suspects_end and lag.get(partition) == 0:
                owned.suspects_end = 0

    def mark_alone(self, record: Record) -> Future[None]:
        """Commit that a record is begun alone. The future fails with `Transient`."""
        owned = self._owned[record.partition]
        if record.offset != owned.committed:  # progress: every earlier record is done
            self.committed({record.partition: record.offset})
        owned.marker = owned.marker._replace(alone=owned.marker.alone + 1)
        return self._inbox.commit({record.partition: Commit(record.offset, str(owned.marker))})

    def num_deaths_alone(self, record: Record) -> int:
        """Return how often the process has died with this record alone in work."""
        owned = self._owned.get(record.partition)
        return owned.marker.alone if owned is not None and record.offset == owned.committed else 0

    def leave(self, partitions: Collection[Partition] | None = None) -> Future[None]:
        """Commit an orderly end of these partitions (None: of all), so that this start is not counted as a death."""
        commits = {
            partition: Commit(owned.committed, str(owned.left))
            for partition, owned in self._owned.items()
            if partitions is None or partition in partitions
        }
        if commits:
            return self._inbox.commit(commits)
        nothing: Future[None] = Future()
        nothing.set_result(None)
        return nothing

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget these partitions: another worker owns them."""
        for partition in partitions:
            self._owned.pop(partition, None)


def _ids(partition: Partition) -> dict[str, object]:
    return {"topic": partition.topic, "partition": partition.number}

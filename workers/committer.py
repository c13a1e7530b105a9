"""Commits offsets at an interval, behind the deliveries that have settled them.

Knows the inbox by its port only; time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from workers.errors import Transient
from workers.ports import Inbox, Interval, Partition, SpanIds
from workers.telemetry.bus_spans import BusSpans

#: First pause before something that failed is tried again.
RETRY_BASE_S = 0.1


class Counts(Protocol):
    """Whom a delivery tells what it does."""

    def count_commit(self) -> None: ...

    def count_retry(self, kind: Literal["publish", "commit"]) -> None: ...

    def observe_publish(self, seconds: float, span: SpanIds | None) -> None:
        """From a record's outcome until the broker has all of it; `span` is that of its processing."""
        ...


@dataclass(slots=True)
class _Batch:
    """What one commit records."""

    offsets: dict[Partition, int] = field(default_factory=dict)
    num_events: int = 0
    spans: list[SpanIds] = field(default_factory=list)  # of those events that are recorded

    def add(self, offsets: Mapping[Partition, int], num_events: int, spans: Iterable[SpanIds]) -> None:
        self.offsets.update(offsets)
        self.num_events += num_events
        self.spans.extend(spans)


@dataclass(slots=True)
class Committer:
    """Commits offsets at an interval, one commit at a time; what failed is committed again with the next."""

    inbox: Inbox
    interval_s: float
    wake: Callable[[], None]
    counts: Counts
    spans: BusSpans
    _waiting: _Batch = field(default_factory=_Batch)
    _flying: _Batch = field(default_factory=_Batch)
    _commit: Future[None] | None = None
    _began_at: float = 0.0
    _due: float = 0.0

    def add(self, offsets: Mapping[Partition, int], num_events: int, spans: Iterable[SpanIds]) -> None:
        """`spans` are those of the events that are recorded."""
        self._waiting.add(offsets, num_events, spans)

    def turn(self, now: float) -> None:
        if self._commit is not None and self._commit.done():
            commit, self._commit = self._commit, None
            flying, self._flying = self._flying, _Batch()
            try:
                commit.result()
            except Transient:
                self.counts.count_retry("commit")
                flying.add(self._waiting.offsets, self._waiting.num_events, self._waiting.spans)
                self._waiting = flying
                self._due = now + max(self.interval_s, RETRY_BASE_S)
            else:
                self.counts.count_commit()
                self.spans.committed(flying.spans, flying.num_events, Interval(self._began_at, now))
        if self._waiting.offsets and self._commit is None and now >= self._due:
            self._flying, self._waiting = self._waiting, _Batch()
            self._due = now + self.interval_s
            self._began_at = now
            self._commit = self.inbox.commit(self._flying.offsets)
            self._commit.add_done_callback(lambda _: self.wake())

    def hurry(self) -> None:
        self._due = 0.0

    def wants_turn_in_s(self, now: float) -> float | None:
        return max(0.0, self._due - now) if self._waiting.offsets and self._commit is None else None

    def settled(self, partitions: Collection[Partition] | None) -> bool:
        outstanding = {*self._waiting.offsets, *self._flying.offsets}
        return not (outstanding if partitions is None else outstanding & set(partitions))

    def drop(self, partitions: Collection[Partition]) -> None:
        for partition in partitions:
            self._waiting.offsets.pop(partition, None)
            self._flying.offsets.pop(partition, None)

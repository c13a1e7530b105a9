"""Commits offsets at an interval, after the outcomes of their records are published.

Knows the inbox by its port only; time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from workers.delivery import DeliveryMetrics
from workers.errors import Transient
from workers.landing import Landing
from workers.partitions import Partitions
from workers.ports import Inbox, Interval, Partition, SpanIds
from workers.retrying import LOOP_BASE_PAUSE_S
from workers.telemetry.bus_spans import BusSpans


@dataclass(slots=True)
class _Batch:
    """The offsets of one commit."""

    offsets: dict[Partition, int] = field(default_factory=dict)
    num_events: int = 0
    spans: list[SpanIds] = field(default_factory=list)  # of the sampled events

    def add(self, offsets: Mapping[Partition, int], num_events: int, spans: Iterable[SpanIds]) -> None:
        self.offsets.update(offsets)
        self.num_events += num_events
        self.spans.extend(spans)


class Committer:
    """Commits offsets at an interval, one commit at a time; a failed commit is repeated with the next."""

    def __init__(
        self,
        inbox: Inbox,
        partitions: Partitions,
        interval_s: float,
        wake: Callable[[], None],
        metrics: DeliveryMetrics,
        spans: BusSpans,
    ) -> None:
        self._inbox = inbox
        self._partitions = partitions
        self._interval_s = interval_s
        self._metrics = metrics
        self._spans = spans
        self._landing = Landing(wake)
        self._waiting = _Batch()
        self._in_flight: _Batch | None = None
        self._began_at = 0.0
        self._due = 0.0
        self._now = 0.0

    def add(self, offsets: Mapping[Partition, int], num_events: int, spans: Iterable[SpanIds]) -> None:
        """Commit these offsets next; `spans` are the spans of the sampled events before them."""
        self._waiting.add(offsets, num_events, spans)

    def turn(self, now: float) -> None:
        self._now = now
        self._landing.turn()
        if self._waiting.offsets and self._in_flight is None and now >= self._due:
            batch, self._waiting = self._waiting, _Batch()
            self._in_flight = batch
            self._due = now + self._interval_s
            self._began_at = now
            commit = self._inbox.commit(self._partitions.commits(batch.offsets))
            self._landing.watch(commit, lambda _: self._committed(batch), lambda error: self._failed(batch, error))

    def _committed(self, batch: _Batch) -> None:
        self._in_flight = None
        self._partitions.committed(batch.offsets)
        self._metrics.count_commit()
        self._spans.committed(batch.spans, batch.num_events, Interval(self._began_at, self._now))

    def _failed(self, batch: _Batch, error: Exception) -> None:
        if not isinstance(error, Transient):
            raise error
        self._in_flight = None
        self._metrics.count_retry("commit")
        batch.add(self._waiting.offsets, self._waiting.num_events, self._waiting.spans)
        self._waiting = batch
        self._due = self._now + max(self._interval_s, LOOP_BASE_PAUSE_S)

    def hurry(self) -> None:
        """Commit in the next turn."""
        self._due = 0.0

    def wants_turn_in_s(self, now: float) -> float | None:
        return max(0.0, self._due - now) if self._waiting.offsets and self._in_flight is None else None

    def committing(self) -> Collection[Partition]:
        """The partitions whose commit is under way."""
        return () if self._in_flight is None else self._in_flight.offsets.keys()

    def settled(self, partitions: Collection[Partition] | None) -> bool:
        outstanding = {*self._waiting.offsets, *self.committing()}
        return not (outstanding if partitions is None else outstanding & set(partitions))

    def drop(self, partitions: Collection[Partition]) -> None:
        for batch in (self._waiting, self._in_flight):
            if batch is not None:
                for partition in partitions:
                    batch.offsets.pop(partition, None)

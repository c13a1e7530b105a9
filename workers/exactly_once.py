"""The delivery promise `exactly_once`: publishes the outcomes of finished records and their offsets in transactions.

A finished record waits for every earlier record of its partition, because offsets are committed in order.
Knows no Kafka; time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import structlog

from workers.delivery import DeliveryMetrics, Undelivered, UndeliveredLimits, log_failed
from workers.errors import Refused, Transient
from workers.landing import Landing
from workers.ledger import Done, Ledger, commit_offsets
from workers.partitions import Partitions
from workers.ports import Finished, Interval, Outgoing, Partition, Record, SpanIds, TransactionalOutbox
from workers.retrying import is_worth_a_line, pause_s
from workers.telemetry.bus_spans import BusSpans

log = structlog.get_logger(__name__)

#: Records in one transaction: enough to amortise its round trips, few enough to stay far below its time limit.
MAX_TRANSACTION_RECORDS = 1000


@dataclass(frozen=True, slots=True)
class _Ready:
    """The outcome of a record that waits for its transaction."""

    messages: tuple[Outgoing, ...]
    finished_at: float
    span: SpanIds | None


class ExactlyOnce:
    """Implements `workers.delivery.Delivery`."""

    def __init__(
        self,
        outbox: TransactionalOutbox,
        executor: Executor,
        partitions: Partitions,
        wake: Callable[[], None],
        interval_s: float,
        metrics: DeliveryMetrics,
        spans: BusSpans,
        limits: UndeliveredLimits,
    ) -> None:
        """`executor` runs one transaction at a time."""
        self._outbox = outbox
        self._executor = executor
        self._partitions = partitions
        self._metrics = metrics
        self._spans = spans
        self._interval_s = interval_s
        self._landing = Landing(wake)
        self._ledger: Ledger[_Ready] = Ledger()
        self._undelivered = Undelivered(limits)
        self._batch: list[Done[_Ready]] = []
        self._is_in_flight = False
        self._dropped: set[Partition] = set()  # dropped while their transaction was in flight
        self._began_at = 0.0
        self._due = 0.0
        self._attempt = 0
        self._now = 0.0

    def has_room(self) -> bool:
        return self._undelivered.has_room()

    def begin(self, record: Record) -> None:
        self._ledger.begin(record)

    def finish(self, finished: Finished, now: float) -> None:
        if self._ledger.finish(finished.record, _Ready(finished.messages, now, finished.span)):
            self._undelivered.add(finished.messages)

    def turn(self, now: float) -> None:
        self._now = now
        self._landing.turn()
        if self._is_in_flight or now < self._due:
            return
        if not self._batch:
            self._batch = self._ledger.take_done(MAX_TRANSACTION_RECORDS, self._is_ready)
        if self._batch:
            self._publish()

    def _is_ready(self, ready: _Ready) -> bool:
        """Whether all topics of an outcome are known or refused; until then, only the record's partition waits."""
        return all([self._outbox.is_decided(message.topic) for message in ready.messages])

    def _publish(self) -> None:
        messages = _messages(self._batch)
        offsets = commit_offsets(self._batch)
        commits = self._partitions.commits(offsets)
        self._due = self._now + self._interval_s
        self._began_at = self._now
        self._is_in_flight = True
        self._landing.start(
            self._executor,
            lambda: self._outbox.publish(messages, commits),
            lambda _: self._committed(offsets),
            self._failed,
        )

    def _committed(self, offsets: dict[Partition, int]) -> None:
        self._partitions.committed(
            {partition: offset for partition, offset in offsets.items() if partition not in self._dropped}
        )
        self._metrics.count_commit()
        self._record(Interval(self._began_at, self._now))
        self._undelivered.remove(_messages(self._batch))
        self._batch = []
        self._attempt = 0
        self._end_flight()

    def _failed(self, error: Exception) -> None:
        match error:
            case Refused():
                if not self._replace(error):
                    log_failed(_messages(self._batch)[error.message_number], self._attempt + 1, error)
                    self._try_again()
            case Transient():
                if is_worth_a_line(self._attempt + 1):
                    log.warning("transaction failed, trying again", attempt=self._attempt + 1, error=str(error))
                self._try_again()
            case _:
                raise error
        self._end_flight()

    def _replace(self, error: Refused) -> bool:
        """Replace the refused message and publish at once; False if there is no replacement."""
        refused = _messages(self._batch)[error.message_number]
        replacement = refused.instead(error)
        if replacement is None:
            return False
        self._batch = _replaced(self._batch, error.message_number, replacement)
        self._undelivered.add([replacement])
        self._undelivered.remove([refused])
        self._spans.sent(refused, Interval(self._began_at, self._now), error)
        self._due = self._now  # the rest of the batch has waited long enough
        return True

    def _try_again(self) -> None:
        self._attempt += 1
        self._metrics.count_retry("publish")
        self._due = self._now + pause_s(self._attempt)

    def _end_flight(self) -> None:
        self._is_in_flight = False
        dropped, self._dropped = self._dropped, set()
        self._forget(dropped)

    def _forget(self, partitions: Collection[Partition]) -> None:
        """Take these partitions out of the batch."""
        if partitions:
            self._undelivered.remove(_messages([done for done in self._batch if done.partition in partitions]))
            self._batch = [done for done in self._batch if done.partition not in partitions]

    def _record(self, transaction: Interval) -> None:
        for done in self._batch:
            for message in done.payload.messages:
                self._spans.sent(message, transaction)
            self._metrics.observe_publish(transaction.ended_at - done.payload.finished_at, done.payload.span)
        spans = [done.payload.span for done in self._batch if done.payload.span is not None]
        self._spans.committed(spans, len(self._batch), transaction)

    def wants_turn_in_s(self, now: float) -> float | None:
        # Trying at an interval is cheaper than finding out whether a partition's oldest record is finished.
        if self._is_in_flight or (not self._batch and self._ledger.num_open() == 0):
            return None
        return max(self._due - now, 0.0 if self._batch else self._interval_s)

    def hurry(self) -> None:
        self._due = 0.0 if self._attempt == 0 else self._due

    def settled(self, partitions: Collection[Partition] | None = None) -> bool:
        pending = {done.partition for done in self._batch}
        return self._ledger.num_open(partitions) == 0 and not (
            pending if partitions is None else pending & set(partitions)
        )

    def committing(self) -> Collection[Partition]:
        return {done.partition for done in self._batch} if self._is_in_flight else ()

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget these partitions; the broker's fencing decides a transaction that is in flight."""
        for ready in self._ledger.forget(partitions):
            self._undelivered.remove(ready.messages)
        if self._is_in_flight:
            self._dropped.update(partitions)
        else:
            self._forget(partitions)


def _messages(batch: Sequence[Done[_Ready]]) -> list[Outgoing]:
    return [message for done in batch for message in done.payload.messages]


def _replaced(batch: Sequence[Done[_Ready]], message_number: int, replacement: Outgoing) -> list[Done[_Ready]]:
    """Return the batch with `replacement` at index `message_number` among all its messages."""
    replaced, start = [], 0
    for done in batch:
        messages = list(done.payload.messages)
        if start <= message_number < start + len(messages):
            messages[message_number - start] = replacement
        start += len(messages)
        replaced.append(Done(done.partition, done.offset, replace(done.payload, messages=tuple(messages))))
    return replaced

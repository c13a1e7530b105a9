"""The delivery promise `at_least_once`: publishes each outcome at once, and commits offsets after acknowledgements.

An offset is committed only when the broker has acknowledged every earlier outcome. A crash may repeat a reply. Messages
of one topic and key are published in order. Knows no Kafka; time is an argument.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

from workers.committer import Committer
from workers.delivery import DeliveryMetrics, Undelivered, UndeliveredLimits, log_failed
from workers.errors import Refused, Transient
from workers.landing import Landing
from workers.ledger import Ledger, commit_offsets
from workers.partitions import Partitions
from workers.ports import Finished, Inbox, Interval, Outbox, Outgoing, Partition, Record, SpanIds
from workers.retrying import pause_s
from workers.telemetry.bus_spans import BusSpans


@dataclass(slots=True)
class _Outcome:
    """A record whose messages are not all acknowledged."""

    record: Record
    num_missing: int
    finished_at: float
    span: SpanIds | None


@dataclass(frozen=True, slots=True)
class _Sending:
    """One message until the broker has acknowledged it; all attempts share the object."""

    outcome: _Outcome
    message: Outgoing
    began_at: float
    attempt: int = 1


class AtLeastOnce:
    """Implements `workers.delivery.Delivery`."""

    def __init__(
        self,
        inbox: Inbox,
        outbox: Outbox,
        partitions: Partitions,
        wake: Callable[[], None],
        commit_interval_s: float,
        metrics: DeliveryMetrics,
        spans: BusSpans,
        limits: UndeliveredLimits,
    ) -> None:
        self._outbox = outbox
        self._metrics = metrics
        self._spans = spans
        self._ledger: Ledger[SpanIds | None] = Ledger()
        self._committer = Committer(inbox, partitions, commit_interval_s, wake, metrics, spans)
        self._landing = Landing(wake)
        self._undelivered = Undelivered(limits)
        self._retries: list[tuple[float, _Sending]] = []
        # By topic and key: the messages that wait for the one that is being sent.
        self._behind: dict[tuple[str, bytes], deque[_Sending]] = {}
        self._now = 0.0

    def has_room(self) -> bool:
        return self._undelivered.has_room()

    def begin(self, record: Record) -> None:
        self._ledger.begin(record)

    def finish(self, finished: Finished, now: float) -> None:
        outcome = _Outcome(finished.record, len(finished.messages), now, finished.span)
        self._undelivered.add(finished.messages)
        for message in finished.messages:
            self._queue(_Sending(outcome, message, now))
        if not finished.messages:
            self._ledger.finish(finished.record, finished.span)

    def _queue(self, sending: _Sending) -> None:
        """Send a message, unless an earlier one with its key is being sent."""
        message = sending.message
        if message.key is not None:
            behind = self._behind.get((message.topic, message.key))
            if behind is not None:
                behind.append(sending)
                return
            self._behind[message.topic, message.key] = deque()
        self._send(sending)

    def _send(self, sending: _Sending) -> None:
        future = self._outbox.send(sending.message)
        self._landing.watch(future, lambda _: self._sent(sending), partial(self._failed, sending))

    def turn(self, now: float) -> None:
        self._now = now
        due = [retry for retry in self._retries if retry[0] <= now]
        if due:
            self._retries = [retry for retry in self._retries if retry[0] > now]
            for _, sending in due:
                self._send(sending)
        self._landing.turn()
        done = self._ledger.take_done()
        if done:
            spans = [message.payload for message in done if message.payload is not None]
            self._committer.add(commit_offsets(done), len(done), spans)
        self._committer.turn(now)

    def _sent(self, sending: _Sending) -> None:
        outcome = sending.outcome
        self._spans.sent(sending.message, Interval(sending.began_at, self._now))
        outcome.num_missing -= 1
        if outcome.num_missing == 0:
            self._ledger.finish(outcome.record, outcome.span)
            self._metrics.observe_publish(self._now - outcome.finished_at, outcome.span)
        self._end(sending.message)

    def _failed(self, sending: _Sending, error: Exception) -> None:
        message, now = sending.message, self._now
        if not isinstance(error, (Refused, Transient)):
            raise error
        if not self._ledger.is_open(sending.outcome.record):  # dropped: the partition's next owner answers it
            self._end(message)
            return
        replacement = message.instead(error) if isinstance(error, Refused) else None
        if replacement is not None:
            self._spans.sent(message, Interval(sending.began_at, now), error)
            self._undelivered.add([replacement])
            self._end(message)
            self._queue(_Sending(sending.outcome, replacement, now))
            return
        log_failed(message, sending.attempt, error)
        self._metrics.count_retry("publish")
        self._retries.append((now + pause_s(sending.attempt), replace(sending, attempt=sending.attempt + 1)))

    def _end(self, message: Outgoing) -> None:
        """Remove a message that needs no more attempts, and send the next one with its key."""
        self._undelivered.remove([message])
        if message.key is None:
            return
        behind = self._behind[message.topic, message.key]
        while behind:
            following = behind.popleft()
            if self._ledger.is_open(following.outcome.record):
                self._send(following)
                return
            self._undelivered.remove([following.message])
        del self._behind[message.topic, message.key]

    def wants_turn_in_s(self, now: float) -> float | None:
        waits = [retry[0] - now for retry in self._retries]
        commit_wait = self._committer.wants_turn_in_s(now)
        if commit_wait is not None:
            waits.append(commit_wait)
        return max(0.0, min(waits)) if waits else None

    def hurry(self) -> None:
        self._committer.hurry()

    def settled(self, partitions: Collection[Partition] | None = None) -> bool:
        return self._ledger.num_open(partitions) == 0 and self._committer.settled(partitions)

    def committing(self) -> Collection[Partition]:
        return self._committer.committing()

    def drop(self, partitions: Collection[Partition]) -> None:
        self._ledger.forget(partitions)
        self._committer.drop(partitions)
        dropped = [sending for _, sending in self._retries if sending.outcome.record.partition in partitions]
        self._retries = [retry for retry in self._retries if retry[1].outcome.record.partition not in partitions]
        for sending in dropped:
            self._end(sending.message)

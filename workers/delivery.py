"""Turns finished records into published messages and committed offsets, under one of two promises.

`AtLeastOnce` publishes each message as it is finished and commits an offset only after the broker has acknowledged
everything before it. `ExactlyOnce` publishes the messages of a run of finished records and their offsets as one
transaction. Neither knows Kafka; time is an argument.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import structlog

from workers.committer import RETRY_BASE_S, Committer, Counts
from workers.errors import Refused, Transient
from workers.ledger import Done, Ledger, commit_offsets
from workers.ports import Finished, Inbox, Interval, Outbox, Outgoing, Partition, Record, SpanIds, TransactionalOutbox
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.trace_context import trace_id_of

log = structlog.get_logger(__name__)

#: Longest pause before the same messages are tried again; it is doubled each time, with full jitter.
RETRY_CAP_S = 5.0
#: Records in one transaction: enough to amortise its round trips, few enough to stay far below its time limit.
MAX_TRANSACTION_RECORDS = 1000


def retry_pause_s(attempt: int) -> float:
    """Exponential backoff with full jitter for the given attempt, counted from 1."""
    return random.uniform(0, min(RETRY_CAP_S, RETRY_BASE_S * 2 ** min(attempt, 10)))


class Delivery(Protocol):
    """What the loop needs: one outcome per record, and to know when nothing is outstanding."""

    def begin(self, record: Record) -> None: ...

    def finish(self, finished: Finished, now: float) -> None: ...

    def turn(self, now: float) -> None:
        """Publish, retry and commit what is due."""
        ...

    def wants_turn_in_s(self, now: float) -> float | None: ...

    def settled(self, partitions: Collection[Partition] | None = None) -> bool:
        """Whether nothing of these partitions (or of any) is in work, unpublished or uncommitted."""
        ...

    def hurry(self) -> None:
        """Commit what can be committed on the next turn instead of at the next interval."""
        ...

    def drop(self, partitions: Collection[Partition]) -> None: ...


@dataclass(slots=True)
class _Unacknowledged:
    record: Record
    remaining: int
    finished_at: float
    span: SpanIds | None


@dataclass(frozen=True, slots=True)
class _Sending:
    """One message on its way; tried again, it is the same sending."""

    entry: _Unacknowledged
    message: Outgoing
    began_at: float
    attempt: int = 1


class AtLeastOnce:
    """Publishes at once, commits behind the acknowledgements. After a crash a reply can come twice."""

    def __init__(
        self,
        inbox: Inbox,
        outbox: Outbox,
        wake: Callable[[], None],
        commit_interval_s: float,
        counts: Counts,
        spans: BusSpans,
    ) -> None:
        self._outbox = outbox
        self._counts = counts
        self._spans = spans
        self._wake = wake
        self._ledger: Ledger[SpanIds | None] = Ledger()
        self._committer = Committer(inbox, commit_interval_s, wake, counts, spans)
        self._acknowledged: deque[tuple[_Sending, BaseException | None]] = deque()
        self._retries: list[tuple[float, _Sending]] = []

    def begin(self, record: Record) -> None:
        self._ledger.begin(record.partition, record.offset)

    def finish(self, finished: Finished, now: float) -> None:
        entry = _Unacknowledged(finished.record, len(finished.messages), now, finished.span)
        for message in finished.messages:
            self._send(_Sending(entry, message, now))
        if not finished.messages:
            self._ledger.finish(finished.record.partition, finished.record.offset, finished.span)

    def _send(self, sending: _Sending) -> None:
        self._outbox.send(sending.message).add_done_callback(partial(self._on_sent, sending))

    def _on_sent(self, sending: _Sending, sent: Future[None]) -> None:
        # Runs on the outbox's thread: hand over and wake, nothing else.
        self._acknowledged.append((sending, sent.exception()))
        self._wake()

    def turn(self, now: float) -> None:
        due = [retry for retry in self._retries if retry[0] <= now]
        if due:
            self._retries = [retry for retry in self._retries if retry[0] > now]
            for _, sending in due:
                self._send(sending)
        while self._acknowledged:
            self._settle(*self._acknowledged.popleft(), now=now)
        done = self._ledger.take_done()
        if done:
            spans = [message.payload for message in done if message.payload is not None]
            self._committer.add(commit_offsets(done), len(done), spans)
        self._committer.turn(now)

    def _settle(self, sending: _Sending, error: BaseException | None, *, now: float) -> None:
        entry, message, attempt = sending.entry, sending.message, sending.attempt
        if error is not None and not self._ledger.is_open(entry.record.partition, entry.record.offset):
            return  # dropped meanwhile: it is another worker's to answer
        match error:
            case None:
                self._spans.sent(message, Interval(sending.began_at, now))
                entry.remaining -= 1
                if entry.remaining == 0:
                    self._ledger.finish(entry.record.partition, entry.record.offset, entry.span)
                    self._counts.observe_publish(now - entry.finished_at, entry.span)
            case Refused():
                self._spans.sent(message, Interval(sending.began_at, now), error)
                self._send(_Sending(entry, message.instead(error), now))
            case Transient():
                log.warning("message not published, trying again", **_about(message), attempt=attempt, error=str(error))
                self._counts.count_retry("publish")
                self._retries.append((now + retry_pause_s(attempt), replace(sending, attempt=attempt + 1)))
            case _:
                raise error

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

    def drop(self, partitions: Collection[Partition]) -> None:
        self._ledger.forget(partitions)
        self._committer.drop(partitions)
        self._retries = [retry for retry in self._retries if retry[1].entry.record.partition not in partitions]


@dataclass(frozen=True, slots=True)
class _Ready:
    """What waits for its transaction."""

    messages: tuple[Outgoing, ...]
    finished_at: float
    span: SpanIds | None


class ExactlyOnce:
    """Messages and offsets in one transaction; a finished record waits for every earlier one of its partition."""

    def __init__(
        self,
        outbox: TransactionalOutbox,
        executor: Executor,
        wake: Callable[[], None],
        interval_s: float,
        counts: Counts,
        spans: BusSpans,
    ) -> None:
        self._outbox = outbox
        self._counts = counts
        self._spans = spans
        self._executor = executor
        self._wake = wake
        self._interval_s = interval_s
        self._ledger: Ledger[_Ready] = Ledger()
        self._batch: list[Done[_Ready]] = []
        self._flying: Future[None] | None = None
        self._began_at = 0.0
        self._gone: set[Partition] = set()  # dropped while their transaction was in flight
        self._due = 0.0
        self._attempt = 0

    def begin(self, record: Record) -> None:
        self._ledger.begin(record.partition, record.offset)

    def finish(self, finished: Finished, now: float) -> None:
        ready = _Ready(finished.messages, now, finished.span)
        self._ledger.finish(finished.record.partition, finished.record.offset, ready)

    def turn(self, now: float) -> None:
        if self._flying is not None and self._flying.done():
            flying, self._flying = self._flying, None
            self._land(flying, now)
        if self._flying is None and now >= self._due:
            if not self._batch:
                self._batch = self._ledger.take_done(MAX_TRANSACTION_RECORDS)
            if self._batch:
                messages = [message for done in self._batch for message in done.payload.messages]
                self._due = now + self._interval_s
                self._began_at = now
                self._flying = self._executor.submit(self._outbox.publish, messages, commit_offsets(self._batch))
                self._flying.add_done_callback(lambda _: self._wake())

    def _land(self, flying: Future[None], now: float) -> None:
        try:
            flying.result()
        except Refused as error:
            self._batch, refused = _replaced(self._batch, error)
            if refused is not None:
                self._spans.sent(refused, Interval(self._began_at, now), error)
            self._due = now  # the others of the batch have waited long enough
        except Transient as error:
            log.warning("transaction failed, trying again", attempt=self._attempt + 1, error=str(error))
            self._counts.count_retry("publish")
            self._attempt += 1
            self._due = now + retry_pause_s(self._attempt)
        else:
            self._counts.count_commit()
            self._record(Interval(self._began_at, now))
            self._batch = []
            self._attempt = 0
        self._batch = [done for done in self._batch if done.partition not in self._gone]
        self._gone = set()

    def _record(self, transaction: Interval) -> None:
        for done in self._batch:
            for message in done.payload.messages:
                self._spans.sent(message, transaction)
            self._counts.observe_publish(transaction.ended_at - done.payload.finished_at, done.payload.span)
        spans = [done.payload.span for done in self._batch if done.payload.span is not None]
        self._spans.committed(spans, len(self._batch), transaction)

    def wants_turn_in_s(self, now: float) -> float | None:
        # Whether the head of a partition is finished is cheap to find out by trying, so it is tried at the interval.
        if self._flying is not None or (not self._batch and self._ledger.num_open() == 0):
            return None
        return max(self._due - now, 0.0 if self._batch else self._interval_s)

    def hurry(self) -> None:
        self._due = 0.0 if self._attempt == 0 else self._due

    def settled(self, partitions: Collection[Partition] | None = None) -> bool:
        pending = {done.partition for done in self._batch}
        return self._ledger.num_open(partitions) == 0 and not (
            pending if partitions is None else pending & set(partitions)
        )

    def drop(self, partitions: Collection[Partition]) -> None:
        """Forget these partitions; a transaction in flight is decided by the broker's own fencing."""
        self._ledger.forget(partitions)
        if self._flying is not None:
            self._gone.update(partitions)
        else:
            self._batch = [done for done in self._batch if done.partition not in partitions]


def _replaced(batch: Sequence[Done[_Ready]], error: Refused) -> tuple[list[Done[_Ready]], Outgoing | None]:
    """The batch with another message in place of the refused one (by its number over the whole batch), and that one."""
    replaced, refused, number = [], None, 0
    for done in batch:
        messages = list(done.payload.messages)
        if number <= error.message_number < number + len(messages):
            place = error.message_number - number
            refused = messages[place]
            messages[place] = refused.instead(error)
        number += len(messages)
        replaced.append(Done(done.partition, done.offset, replace(done.payload, messages=tuple(messages))))
    return replaced, refused


def _about(message: Outgoing) -> dict[str, object]:
    """What a log line about a message carries."""
    key = None if message.key is None else message.key.decode("utf-8", "replace")
    return {"topic": message.topic, "key": key, "trace_id": trace_id_of(message.headers)}

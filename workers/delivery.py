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
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog

from workers.committer import RETRY_BASE_S, Committer, Counts
from workers.errors import Refused, Transient
from workers.job import Finished
from workers.ledger import Done, Ledger, commit_offsets
from workers.ports import Inbox, Outbox, Outgoing, Partition, Record, TransactionalOutbox

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


class AtLeastOnce:
    """Publishes at once, commits behind the acknowledgements. After a crash a reply can come twice."""

    def __init__(
        self, inbox: Inbox, outbox: Outbox, wake: Callable[[], None], commit_interval_s: float, counts: Counts
    ) -> None:
        self._outbox = outbox
        self._counts = counts
        self._wake = wake
        self._ledger: Ledger[None] = Ledger()
        self._committer = Committer(inbox, commit_interval_s, wake, counts)
        self._acknowledged: deque[tuple[_Unacknowledged, Outgoing, int, BaseException | None]] = deque()
        self._retries: list[tuple[float, _Unacknowledged, Outgoing, int]] = []

    def begin(self, record: Record) -> None:
        self._ledger.begin(record.partition, record.offset)

    def finish(self, finished: Finished, now: float) -> None:
        entry = _Unacknowledged(finished.record, len(finished.messages))
        for message in finished.messages:
            self._send(entry, message, attempt=1)
        if not finished.messages:
            self._ledger.finish(finished.record.partition, finished.record.offset, None)

    def _send(self, entry: _Unacknowledged, message: Outgoing, attempt: int) -> None:
        self._outbox.send(message).add_done_callback(partial(self._on_sent, entry, message, attempt))

    def _on_sent(self, entry: _Unacknowledged, message: Outgoing, attempt: int, sent: Future[None]) -> None:
        # Runs on the outbox's thread: hand over and wake, nothing else.
        self._acknowledged.append((entry, message, attempt, sent.exception()))
        self._wake()

    def turn(self, now: float) -> None:
        due = [retry for retry in self._retries if retry[0] <= now]
        if due:
            self._retries = [retry for retry in self._retries if retry[0] > now]
            for _, entry, message, attempt in due:
                self._send(entry, message, attempt)
        while self._acknowledged:
            self._settle(*self._acknowledged.popleft(), now=now)
        done = self._ledger.take_done()
        if done:
            self._committer.add(commit_offsets(done))
        self._committer.turn(now)

    def _settle(
        self, entry: _Unacknowledged, message: Outgoing, attempt: int, error: BaseException | None, *, now: float
    ) -> None:
        if error is not None and not self._ledger.is_open(entry.record.partition, entry.record.offset):
            return  # dropped meanwhile: it is another worker's to answer
        match error:
            case None:
                entry.remaining -= 1
                if entry.remaining == 0:
                    self._ledger.finish(entry.record.partition, entry.record.offset, None)
            case Refused():
                self._send(entry, message.instead(error), attempt=1)
            case Transient():
                log.warning("message not published, trying again", attempt=attempt, error=str(error))
                self._counts.count_retry("publish")
                self._retries.append((now + retry_pause_s(attempt), entry, message, attempt + 1))
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
        self._retries = [retry for retry in self._retries if retry[1].record.partition not in partitions]


class ExactlyOnce:
    """Messages and offsets in one transaction; a finished record waits for every earlier one of its partition."""

    def __init__(
        self,
        outbox: TransactionalOutbox,
        executor: Executor,
        wake: Callable[[], None],
        interval_s: float,
        counts: Counts,
    ) -> None:
        self._outbox = outbox
        self._counts = counts
        self._executor = executor
        self._wake = wake
        self._interval_s = interval_s
        self._ledger: Ledger[tuple[Outgoing, ...]] = Ledger()
        self._batch: list[Done[tuple[Outgoing, ...]]] = []
        self._flying: Future[None] | None = None
        self._gone: set[Partition] = set()  # dropped while their transaction was in flight
        self._due = 0.0
        self._attempt = 0

    def begin(self, record: Record) -> None:
        self._ledger.begin(record.partition, record.offset)

    def finish(self, finished: Finished, now: float) -> None:
        self._ledger.finish(finished.record.partition, finished.record.offset, finished.messages)

    def turn(self, now: float) -> None:
        if self._flying is not None and self._flying.done():
            flying, self._flying = self._flying, None
            self._land(flying, now)
        if self._flying is None and now >= self._due:
            if not self._batch:
                self._batch = self._ledger.take_done(MAX_TRANSACTION_RECORDS)
            if self._batch:
                messages = [message for done in self._batch for message in done.payload]
                self._due = now + self._interval_s
                self._flying = self._executor.submit(self._outbox.publish, messages, commit_offsets(self._batch))
                self._flying.add_done_callback(lambda _: self._wake())

    def _land(self, flying: Future[None], now: float) -> None:
        try:
            flying.result()
        except Refused as error:
            self._batch = _replaced(self._batch, error)
            self._due = now  # the others of the batch have waited long enough
        except Transient as error:
            log.warning("transaction failed, trying again", attempt=self._attempt + 1, error=str(error))
            self._counts.count_retry("publish")
            self._attempt += 1
            self._due = now + retry_pause_s(self._attempt)
        else:
            self._counts.count_commit()
            self._batch = []
            self._attempt = 0
        self._batch = [done for done in self._batch if done.partition not in self._gone]
        self._gone = set()

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


def _replaced(batch: Sequence[Done[tuple[Outgoing, ...]]], error: Refused) -> list[Done[tuple[Outgoing, ...]]]:
    """The batch with another message in place of the refused one (by its number over the whole batch)."""
    replaced, number = [], 0
    for done in batch:
        messages = list(done.payload)
        if number <= error.message_number < number + len(messages):
            place = error.message_number - number
            messages[place] = messages[place].instead(error)
        number += len(done.payload)
        replaced.append(Done(done.partition, done.offset, tuple(messages)))
    return replaced

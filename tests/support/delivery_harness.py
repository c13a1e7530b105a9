"""A delivery under test, with an outbox that acknowledges and an executor that runs when the test calls them."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Executor, Future
from dataclasses import replace

from workers.at_least_once import AtLeastOnce
from workers.bus.memory import MemoryBroker, MemoryInbox, MemoryTransactionalOutbox
from workers.delivery import UndeliveredLimits
from workers.exactly_once import ExactlyOnce
from workers.partitions import Partitions
from workers.ports import Finished, Outgoing, Partition, Record
from workers.telemetry.bus_spans import BusSpans

A, B = Partition("in", 0), Partition("in", 1)
LATER = 1000.0  # past every retry


def record(offset: int, partition: Partition = A, epoch: int = 0) -> Record:
    return Record(partition, offset, b"k", b"v", (), 0, epoch=epoch)


def reply(value: bytes = b"reply", fallback: bytes | None = b"too large", key: bytes | None = None) -> Outgoing:
    message = Outgoing("out", key, value)
    if fallback is None:
        return message
    return replace(message, if_refused=lambda refused: Outgoing("out", key, fallback))


class Counted(Counter):
    """Counts what the delivery reports."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[tuple[float, object]] = []  # seconds, and the span of the record

    def count_commit(self) -> None:
        self["commit"] += 1

    def count_retry(self, kind: str) -> None:
        self[f"retry {kind}"] += 1

    def observe_publish(self, seconds: float, span: object) -> None:
        self.published.append((seconds, span))


class HeldOutbox:
    """Acknowledges messages when the test calls `settle`."""

    def __init__(self) -> None:
        self.sent: list[tuple[Outgoing, Future[None]]] = []

    def send(self, message: Outgoing) -> Future[None]:
        self.sent.append((message, Future()))
        return self.sent[-1][1]

    def close(self, timeout_s: float) -> None:
        """Nothing is held open."""

    def settle(self, number: int, error: Exception | None = None) -> None:
        future = self.sent[number][1]
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    @property
    def values(self) -> list[bytes | None]:
        return [message.value for message, _ in self.sent]


class HeldExecutor(Executor):
    """Runs submitted calls when the test calls `run`."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Future, object]] = []

    def submit(self, call, /, *args, **kwargs) -> Future:
        future: Future = Future()
        self.submitted.append((future, lambda: call(*args, **kwargs)))
        return future

    def run(self) -> None:
        future, call = self.submitted.pop(0)
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)


def committed_in(broker: MemoryBroker) -> dict[Partition, int]:
    """Return the group's committed offsets, without commits that only mark the start of work."""
    return {partition: commit.offset for (_, partition), commit in broker.committed.items() if commit.offset > 0}


class AtLeastOnceBench:
    def __init__(
        self,
        *,
        interval_s: float = 0.0,
        spans: BusSpans | None = None,
        limits: UndeliveredLimits | None = None,
    ) -> None:
        self.broker = MemoryBroker(num_partitions=2)
        self.inbox = MemoryInbox(self.broker, topic="in", group_id="g")
        self.outbox = HeldOutbox()
        self.wakes = 0
        self.counts = Counted()
        self.delivery = AtLeastOnce(
            self.inbox,
            self.outbox,
            Partitions(self.inbox, self.wake),
            self.wake,
            interval_s,
            self.counts,
            spans or BusSpans.off(),
            limits or UndeliveredLimits(),
        )

    def wake(self) -> None:
        self.wakes += 1

    def begin(self, *offsets: int, partition: Partition = A) -> None:
        for offset in offsets:
            self.delivery.begin(record(offset, partition))

    def finish(self, offset: int, *messages: Outgoing, partition: Partition = A) -> None:
        self.delivery.finish(Finished(record(offset, partition), messages), 0.0)

    def turn(self, now: float = 0.0) -> None:
        self.delivery.turn(now)  # sees acknowledgements and commits
        self.delivery.turn(now)  # sees that the commit is through

    @property
    def committed(self) -> dict[Partition, int]:
        return committed_in(self.broker)


class ExactlyOnceBench:
    def __init__(
        self,
        *,
        interval_s: float = 0.0,
        max_message_bytes: int = 1000,
        spans: BusSpans | None = None,
        limits: UndeliveredLimits | None = None,
    ) -> None:
        self.broker = MemoryBroker(num_partitions=2, max_message_bytes=max_message_bytes)
        self.executor = HeldExecutor()
        self.outbox = MemoryTransactionalOutbox(self.broker, group_id="g")
        self.counts = Counted()
        inbox = MemoryInbox(self.broker, topic="in", group_id="g")
        self.delivery = ExactlyOnce(
            self.outbox,
            self.executor,
            Partitions(inbox, lambda: None),
            lambda: None,
            interval_s,
            self.counts,
            spans or BusSpans.off(),
            limits or UndeliveredLimits(),
        )

    def begin(self, *offsets: int, partition: Partition = A) -> None:
        for offset in offsets:
            self.delivery.begin(record(offset, partition))

    def finish(self, offset: int, *values: bytes, partition: Partition = A) -> None:
        self.finish_with(offset, *(reply(value) for value in values), partition=partition)

    def finish_with(self, offset: int, *messages: Outgoing, partition: Partition = A) -> None:
        self.delivery.finish(Finished(record(offset, partition), messages), 0.0)

    def transact(self, now: float = 0.0) -> None:
        self.delivery.turn(now)
        self.executor.run()
        self.delivery.turn(now)

    @property
    def published(self) -> list[bytes]:
        return sorted(record.value for record in self.broker.log("out"))

    @property
    def committed(self) -> dict[Partition, int]:
        return committed_in(self.broker)

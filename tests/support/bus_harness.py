"""A common interface of the in-memory bus and a real Kafka, so that one suite tests both."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import warnings
from collections.abc import Callable

from kafka import KafkaAdminClient

from services import create_topics
from workers.bus.consumer import KafkaInbox
from workers.bus.follower import KafkaFollower
from workers.bus.memory import MemoryBroker, MemoryFollower, MemoryInbox, MemoryOutbox, MemoryTransactionalOutbox
from workers.bus.producer import KafkaOutbox
from workers.bus.transactions import KafkaTransactionalOutbox
from workers.partitions import first_offset
from workers.ports import Outgoing, Record

LIMIT_S = 30.0
#: Largest message; topics with a separate limit accept less.
MAX_MESSAGE_BYTES = 200_000


def eventually(condition: Callable[[], object], limit_s: float = LIMIT_S) -> float:
    """Wait until the condition is true; returns the seconds it took."""
    started, pause = time.monotonic(), threading.Event()
    while not condition():
        assert time.monotonic() - started < limit_s, f"the condition is still false after {limit_s:.0f} s"
        pause.wait(0.005)
    return time.monotonic() - started


def open_all(inbox) -> None:
    """Release revoked partitions at once and open assigned ones, as the loop does."""
    for revocation in inbox.revocations():
        revocation.release()
    for assignment in inbox.assignments():
        inbox.open(assignment, first_offset(assignment))


def take(inbox, number: int, limit_s: float = LIMIT_S) -> list[Record]:
    """Return the next `number` records; releases revoked partitions at once."""
    records: list[Record] = []

    def has_all() -> bool:
        open_all(inbox)
        while len(records) < number and (record := inbox.take()) is not None:
            records.append(record)
        return len(records) == number

    eventually(has_all, limit_s)
    return records


def take_until(inbox, wanted: set[bytes]) -> None:
    """Take records until all these values have arrived; others may arrive too, and any may arrive twice."""
    missing = set(wanted)
    while missing:
        missing.discard(take(inbox, 1)[0].value)


def values(records) -> list[bytes]:
    return [record.value for record in records]


class MemoryBus:
    """The twin."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.broker = MemoryBroker(max_message_bytes=MAX_MESSAGE_BYTES)

    def topic(self, name: str, *, partitions: int = 1, max_message_bytes: int = MAX_MESSAGE_BYTES) -> str:
        self.broker.num_partitions = partitions
        self.broker.max_message_bytes = max_message_bytes
        return self.prefix + name

    def refused_topic(self) -> str:
        self.broker.refused_topics = {"closed"}
        return "closed"

    def inbox(self, topic: str, *, group: str = "group", **_) -> MemoryInbox:
        return MemoryInbox(self.broker, topic=topic, group_id=group)

    def follower(self, topic: str, **settings) -> MemoryFollower:
        return MemoryFollower(self.broker, topic, **settings)

    def outbox(self) -> MemoryOutbox:
        return MemoryOutbox(self.broker)

    def transactional_outbox(self, inbox: MemoryInbox, *, group: str = "group") -> MemoryTransactionalOutbox:
        return MemoryTransactionalOutbox(self.broker, group_id=group)

    def close(self) -> None:
        """Nothing is held open."""


class KafkaBus:
    """A real Kafka; closes the clients it made."""

    def __init__(self, brokers: str, prefix: str, **connection) -> None:
        self.prefix = prefix
        self.brokers = brokers
        self.connection = {"bootstrap_servers": brokers.split(","), **connection}
        self._made = contextlib.ExitStack()

    def topic(self, name: str, *, partitions: int = 1, max_message_bytes: int = MAX_MESSAGE_BYTES) -> str:
        if max_message_bytes == MAX_MESSAGE_BYTES:
            create_topics(self.brokers, {self.prefix + name: partitions})
        else:
            with contextlib.closing(KafkaAdminClient(**self.connection)) as admin:
                configs = {"max.message.bytes": str(max_message_bytes)}
                admin.create_topics(
                    {self.prefix + name: {"num_partitions": partitions, "configs": configs}}, wait_for_metadata=True
                )
        return self.prefix + name

    def refused_topic(self) -> str:
        return "__consumer_offsets"  # where only the broker itself writes

    def inbox(self, topic: str, *, group: str = "group", read_committed: bool = True, max_poll_records: int = 100):
        return self._closing(
            KafkaInbox(
                self.connection,
                topic=topic,
                group_id=self.prefix + group,
                wake=lambda: None,
                read_committed=read_committed,
                max_poll_records=max_poll_records,
                max_message_bytes=MAX_MESSAGE_BYTES,
            )
        )

    def follower(self, topic: str, *, wake=lambda: None, **settings) -> KafkaFollower:
        return self._closing(
            KafkaFollower(self.connection, topic, wake=wake, max_message_bytes=MAX_MESSAGE_BYTES, **settings)
        )

    def outbox(self, **connection) -> KafkaOutbox:
        return self._closing(KafkaOutbox({**self.connection, **connection}, max_message_bytes=MAX_MESSAGE_BYTES))

    def transactional_outbox(self, inbox: KafkaInbox, *, membership=None, name: str = "producer", **settings):
        return self._closing(
            KafkaTransactionalOutbox(
                self.connection,
                transactional_id=self.prefix + name,
                membership=membership or inbox.membership,
                committed=inbox.committed,
                max_message_bytes=MAX_MESSAGE_BYTES,
                **settings,
            )
        )

    def _closing(self, made):
        self._made.callback(made.close, 5.0)
        return made

    def close(self) -> None:
        self._made.close()
        # A connection that kafka-python begins while its client is closed is left to the garbage collector, which
        # would complain in the middle of some later test.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "unclosed <socket", ResourceWarning)
            gc.collect()


def messages(topic: str, number: int, start: int = 0, key: bytes | None = b"key") -> list[Outgoing]:
    return [Outgoing(topic, key, b"%d" % n, (("traceparent", b"t%d" % n),)) for n in range(start, start + number)]


def send_all(outbox, sent: list[Outgoing]) -> None:
    for future in [outbox.send(message) for message in sent]:
        future.result(LIMIT_S)

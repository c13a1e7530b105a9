"""Kafka behind the ports of `workers.ports`: the only file that knows kafka-python.

The consumer lives on a thread of its own, because its poll blocks (on the broker, and on a rebalance that waits for
messages in work); what it polls waits in a short queue until the loop takes it. While the queue is full the partitions
are paused and polling goes on, so that the group keeps this member. Foreign errors become `workers.errors` here.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import kafka.errors as kafka_errors
import structlog
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.future import Future as KafkaFuture
from kafka.structs import OffsetAndMetadata

from workers.errors import Misconfigured, TooLarge, Transient
from workers.ports import Outgoing, Partition, Record, Revocation

log = structlog.get_logger(__name__)

#: Records that wait for the loop before polling pauses; two polls' worth keeps the loop fed between polls.
MAX_WAITING_RECORDS = 256
#: How long a poll waits for records; also how soon the thread notices that it is to stop.
POLL_S = 0.1
#: While the queue is full, a poll this often keeps the membership and serves rebalances.
FULL_POLL_S = 0.5
COMMIT_TIMEOUT_S = 10.0

_MISCONFIGURED = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.KafkaConfigurationError,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.InvalidTopicError,
)
#: The group or the transaction has moved on; the next attempt, with fresh membership, decides.
_REBALANCING = (
    kafka_errors.CommitFailedError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.FencedInstanceIdError,
    kafka_errors.TransactionAbortedError,
    kafka_errors.TransactionAbortableError,
)
_TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)


def translated(error: BaseException) -> BaseException:
    """The worker's error for a Kafka error; an error with no remedy comes back as it is."""
    if isinstance(error, _TOO_LARGE):
        return TooLarge(str(error))
    if isinstance(error, _MISCONFIGURED):
        return Misconfigured(f"Kafka refuses this worker: {type(error).__name__}: {error}")
    if isinstance(error, (kafka_errors.RetriableError, *_REBALANCING)):
        return Transient(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Turn Kafka's errors into the worker's."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise translated(error) from error


def _connecting(make: Callable[[], Any]) -> Any:
    """Make a client, or raise what starting without a broker means."""
    try:
        return make()
    except kafka_errors.KafkaError as error:
        known = translated(error)
        raise known if known is not error else Transient(f"no Kafka broker answers: {error}") from error


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Holds a rebalance until the loop has given the partitions back; awaits, so that heartbeats go on."""

    def __init__(self, inbox: KafkaInbox) -> None:
        self._inbox = inbox

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._inbox.note_revocation(revoked, lost=False)

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        await self._inbox.note_revocation(lost, lost=True)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        log.info("partitions assigned", partitions=sorted(f"{p.topic}-{p.partition}" for p in assigned))


class KafkaInbox:
    """A member of a consumer group that reads one topic; implements `workers.ports.Inbox`."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        *,
        topic: str,
        group_id: str,
        wake: Callable[[], None],
        read_committed: bool,
        max_poll_records: int,
        max_message_bytes: int,
    ) -> None:
        """`connection` is what every client of this broker needs (`workers.kafka_connection`)."""
        self._wake = wake
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting: deque[Record] = deque()
        self._revocations: list[Revocation] = []
        self._error: BaseException | None = None
        self._closing = False
        self._consumer = _connecting(
            lambda: KafkaConsumer(
                **connection,
                group_id=group_id,
                enable_auto_commit=False,
                auto_offset_reset="earliest",  # a request published before the first worker is still answered
                isolation_level="read_committed" if read_committed else "read_uncommitted",
                partition_assignment_strategy=(CooperativeStickyAssignor,),
                max_poll_records=max_poll_records,
                max_partition_fetch_bytes=max(1 << 20, max_message_bytes + (64 << 10)),
                metrics_enabled=False,
            )
        )
        self._consumer.subscribe([topic], listener=_Listener(self))
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="kafka-commit")
        self._thread = threading.Thread(target=self._poll_until_closed, name="kafka-poll", daemon=True)
        self._thread.start()

    def take(self) -> Record | None:
        if self._error is not None:
            raise self._error
        with self._lock:
            if not self._waiting:
                return None
            record = self._waiting.popleft()
            if len(self._waiting) == MAX_WAITING_RECORDS // 2:
                self._room.notify()
            return record

    def revocations(self) -> list[Revocation]:
        with self._lock:
            revocations, self._revocations = self._revocations, []
            return revocations

    def commit(self, offsets: Mapping[Partition, int]) -> Future[None]:
        return self._committer.submit(self._commit, dict(offsets))

    def _commit(self, offsets: dict[Partition, int]) -> None:
        with translating():
            self._consumer.commit(_kafka_offsets(offsets), timeout_ms=int(COMMIT_TIMEOUT_S * 1000))

    def assigned(self) -> frozenset[Partition]:
        return frozenset(Partition(*partition) for partition in self._consumer.assignment())

    def lag(self) -> Mapping[Partition, int]:
        lags = {}
        for partition in self._consumer.assignment():
            high = self._consumer.highwater(partition)
            position = self._consumer.position(partition, timeout_ms=0) if high is not None else None
            if high is not None and position is not None:
                lags[Partition(*partition)] = max(0, high - position)
        return lags

    def membership(self) -> Any:
        """What a transaction needs so that the broker can fence it (KIP-447); opaque."""
        return self._consumer.group_metadata()

    def close(self, timeout_s: float) -> None:
        with self._lock:
            self._closing = True
            revocations, self._revocations = self._revocations, []
            self._room.notify()
        for revocation in revocations:
            revocation.release()
        self._committer.shutdown(wait=True)
        self._thread.join(timeout_s)
        self._consumer.close(autocommit=False, timeout_ms=int(timeout_s * 1000))

    def _poll_until_closed(self) -> None:
        try:
            while not self._closing:
                self._wait_for_room()
                self._poll()
        except BaseException as error:
            self._error = error
            self._wake()

    def _wait_for_room(self) -> None:
        with self._lock:
            if len(self._waiting) >= MAX_WAITING_RECORDS and not self._closing:
                self._room.wait(FULL_POLL_S)

    def _poll(self) -> None:
        """Poll once; while the queue is full only for the group's sake, with everything paused."""
        full = len(self._waiting) >= MAX_WAITING_RECORDS
        assigned = self._consumer.assignment()
        if full:
            self._consumer.pause(*assigned)
        elif self._consumer.paused():
            self._consumer.resume(*self._consumer.paused())
        try:
            polled = self._consumer.poll(timeout_ms=0 if full else int(POLL_S * 1000))
        except kafka_errors.RetriableError as error:
            log.warning("kafka poll failed, trying again", error=f"{type(error).__name__}: {error}")
            with self._lock:
                self._room.wait(POLL_S)
            return
        except kafka_errors.KafkaError as error:
            raise translated(error) from error
        if polled:
            with self._lock:
                for partition, records in polled.items():
                    self._waiting.extend(_record(Partition(*partition), record) for record in records)
            self._wake()

    async def note_revocation(self, revoked: set[TopicPartition], *, lost: bool) -> None:
        """Runs on Kafka's IO thread, inside a poll: returns when the loop has released the partitions."""
        partitions = frozenset(Partition(*partition) for partition in revoked)
        released = KafkaFuture()

        def release() -> None:
            if not released.is_done:
                released.success(None)
                with contextlib.suppress(RuntimeError):  # closed meanwhile: nobody waits any more
                    # A future set from another thread does not wake Kafka's IO loop; an empty commit does.
                    self._consumer.commit_async({}, callback=lambda *_: None)

        with self._lock:
            self._waiting = deque(record for record in self._waiting if record.partition not in partitions)
            if self._closing:
                return
            self._revocations.append(Revocation(partitions, lost, release))
        self._wake()
        if not lost:
            await released


class KafkaOutbox:
    """An idempotent producer; implements `workers.ports.Outbox`."""

    def __init__(self, connection: Mapping[str, Any], *, max_message_bytes: int, linger_ms: int = 0) -> None:
        self._producer = _connecting(
            lambda: KafkaProducer(
                **connection, max_request_size=max_message_bytes, linger_ms=linger_ms, metrics_enabled=False
            )
        )

    def send(self, message: Outgoing) -> Future[None]:
        sent: Future[None] = Future()
        try:
            pending = _send(self._producer, message)
        except kafka_errors.KafkaError as error:
            sent.set_exception(translated(error))
        else:
            pending.add_callback(lambda _: sent.set_result(None))
            pending.add_errback(lambda error: sent.set_exception(translated(error)))
        return sent

    def close(self, timeout_s: float) -> None:
        self._producer.close(timeout=timeout_s)


class KafkaTransactionalOutbox:
    """A transactional producer whose transactions carry a group's offsets; implements `TransactionalOutbox`."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        *,
        transactional_id: str,
        membership: Callable[[], Any],
        max_message_bytes: int,
    ) -> None:
        """`membership` gives the consumer's group membership at the moment of each transaction."""
        self._membership = membership
        self._make = lambda: KafkaProducer(
            **connection, transactional_id=transactional_id, max_request_size=max_message_bytes, metrics_enabled=False
        )
        self._producer: Any = None
        self._open()

    def _open(self) -> None:
        self._producer = _connecting(self._make)
        with translating():
            self._producer.init_transactions()

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int]) -> None:
        if self._producer is None:
            self._open()
        try:
            self._producer.begin_transaction()
            pending = []
            for number, message in enumerate(messages):
                try:
                    pending.append(_send(self._producer, message))
                except _TOO_LARGE as error:
                    raise TooLarge(str(error), number) from error
            self._producer.flush()
            for number, future in enumerate(pending):
                if isinstance(future.exception, _TOO_LARGE):
                    raise TooLarge(str(future.exception), number)
            self._producer.send_offsets_to_transaction(_kafka_offsets(offsets), self._membership())
            self._producer.commit_transaction()
        except BaseException as error:
            self._give_up()
            if isinstance(error, (kafka_errors.ProducerFencedError, kafka_errors.InvalidProducerEpochError)):
                # The broker aborted the transaction (its time limit, or a broker that was away); a new epoch is clean.
                raise Transient(f"{type(error).__name__}: {error}") from error
            if isinstance(error, kafka_errors.KafkaError):
                raise translated(error) from error
            raise

    def _give_up(self) -> None:
        """Abort; a producer that cannot even do that is replaced at the next attempt, whose start aborts for it."""
        try:
            self._producer.abort_transaction()
        except kafka_errors.KafkaError as error:
            log.warning("transaction could not be aborted, starting a new producer", error=str(error))
            producer, self._producer = self._producer, None
            producer.close(timeout=0)

    def close(self, timeout_s: float) -> None:
        if self._producer is not None:
            self._producer.close(timeout=timeout_s)


def _send(producer: KafkaProducer, message: Outgoing) -> Any:
    return producer.send(message.topic, value=message.value, key=message.key, headers=list(message.headers))


def _kafka_offsets(offsets: Mapping[Partition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}


def _record(partition: Partition, record: Any) -> Record:
    return Record(
        partition=partition,
        offset=record.offset,
        key=record.key,
        value=record.value if record.value is not None else b"",
        headers=tuple(record.headers or ()),
        timestamp_ms=record.timestamp,
    )


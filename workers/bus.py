"""Kafka behind the ports of `workers.ports`: the only file that knows kafka-python.

The consumer lives on a thread of its own, because its poll blocks (on the broker, and on a rebalance that waits for
messages in work); what it polls waits in a short queue until the loop takes it. While the queue is full the partitions
are paused and polling goes on, so that the group keeps this member. Foreign errors become `workers.errors` here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

import kafka.errors as kafka_errors
import structlog
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.future import Future as KafkaFuture
from kafka.net.compat import KafkaNetClient
from kafka.structs import MemberState, OffsetAndMetadata

from workers.errors import Misconfigured, TooLarge, Transient, WorkerError
from workers.ports import Outgoing, Partition, Record, Revocation

log = structlog.get_logger(__name__)

#: Records that wait for the loop before polling pauses; two polls' worth keeps the loop fed between polls.
MAX_WAITING_RECORDS = 256
#: The same bound for large records: an image event may carry the whole image.
MAX_WAITING_BYTES = 64 << 20
#: How long a poll waits for records; also how soon the thread notices that it is to stop.
POLL_S = 0.1
#: While the queue is full, a poll this often keeps the membership and serves rebalances.
FULL_POLL_S = 0.5
COMMIT_TIMEOUT_S = 10.0
#: A member learns of a rebalance from the answer to its heartbeat. At the client's default of 3 s a partition that
#: changes hands waits for up to two of them; this costs two small requests a second.
HEARTBEAT_MS = 500
#: A killed member's partitions stand still for so long, and readers of its open transaction wait. The client's own
#: defaults (45 s and 60 s) are for consumers that may pause; this one answers from its IO thread, twice a second.
SESSION_TIMEOUT_MS = 10_000
#: How often the lag is looked up: it is for people and autoscalers, and costs as much as an empty poll.
LOOK_INTERVAL_S = 1.0
#: The broker hung up this often before a first connection was ready: it does so at once, in about two seconds in all.
MAX_CUT_OFF = 5
CUT_OFF = "the broker ends every connection before it is ready; is it the credentials, or the security protocol?"
#: How long a send may wait for a topic that the producer has not met before.
METADATA_TIMEOUT_MS = 10_000

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
    kafka_errors.ProducerFencedError,  # also what a transaction over its time limit and a restarted broker end in
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.OutOfOrderSequenceNumberError,
    kafka_errors.UnknownProducerIdError,
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
        known = translated(error)
        if known is error:
            raise
        raise known from error


def _connecting(make: Callable[[], Any]) -> Any:
    """Make a client, or raise what starting without a broker means."""
    try:
        return make()
    except kafka_errors.KafkaError as error:
        known = translated(error)
        raise known if known is not error else Transient(f"no Kafka broker answers: {error}") from error


def _started(kind: Callable[..., Any], **settings: Any) -> Any:
    """A client of this kind.

    kafka-python 3.0.12 tries refused credentials again until its time is up, and a client that fails to start leaves
    its thread and its sockets behind; both are made good here.
    """
    nets: list[KafkaNetClient] = []

    def watched(**net_settings: Any) -> KafkaNetClient:
        net = KafkaNetClient(**net_settings)
        nets.append(net)
        manager, connect = net._manager, net._manager.get_connection
        refusals: list[BaseException] = []
        cut_off: list[BaseException] = []

        def note_refusal(error: BaseException) -> None:
            if isinstance(error, _MISCONFIGURED):
                refusals.append(error)
            elif "socket disconnected" in str(error):
                # Of a refused password kafka-python often sees only that the broker hangs up.
                cut_off.append(error)
                if len(cut_off) == MAX_CUT_OFF:
                    refusals.append(kafka_errors.KafkaConfigurationError(CUT_OFF))

        def connect_and_watch(*place: Any, **options: Any) -> Any:
            if refusals:
                raise refusals[0]
            connection = connect(*place, **options)
            connection.init_future.add_errback(note_refusal)
            return connection

        manager.get_connection = connect_and_watch
        return net

    try:
        client = _connecting(lambda: kind(**settings, kafka_client=watched, metrics_enabled=False))
    except BaseException:
        for net in nets:
            net.close()
        raise
    for net in nets:
        del net._manager.get_connection  # later on, a broker that refuses may be one that is still starting
    return client


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
        session_timeout_ms: int = SESSION_TIMEOUT_MS,
    ) -> None:
        """`connection` is what every client of this broker needs (`workers.kafka_connection`)."""
        self._topic = topic
        self._wake = wake
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting: deque[Record] = deque()
        self._waiting_bytes = 0
        self._revocations: list[Revocation] = []
        self._unreleased: list[KafkaFuture] = []
        self._beyond: dict[Partition, int] = {}  # messages that are not polled yet, as of the last look
        self._look_due = 0.0
        self._error: BaseException | None = None
        self._closing = False
        self._consumer = _started(
            KafkaConsumer,
            **connection,
            group_id=group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # a request published before the first worker is still answered
            isolation_level="read_committed" if read_committed else "read_uncommitted",
            partition_assignment_strategy=(CooperativeStickyAssignor,),
            max_poll_records=max_poll_records,
            heartbeat_interval_ms=HEARTBEAT_MS,
            session_timeout_ms=session_timeout_ms,
            max_partition_fetch_bytes=max(1 << 20, max_message_bytes + (64 << 10)),
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
            was_low = self._is_low()
            record = self._waiting.popleft()
            self._waiting_bytes -= len(record.value)
            if self._is_low() and not was_low:
                self._room.notify()
            return record

    def _is_low(self) -> bool:
        return len(self._waiting) <= MAX_WAITING_RECORDS // 2 and self._waiting_bytes <= MAX_WAITING_BYTES // 2

    def _is_full(self) -> bool:
        return len(self._waiting) >= MAX_WAITING_RECORDS or self._waiting_bytes >= MAX_WAITING_BYTES

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
        with self._lock:
            waiting = Counter(record.partition for record in self._waiting)
        beyond = self._beyond
        return {p: beyond[p] + waiting[p] for p in self.assigned() if p in beyond}

    def membership(self) -> Any:
        """What a transaction needs so that the broker can fence it (KIP-447); opaque."""
        return self._consumer.group_metadata()

    def close(self, timeout_s: float) -> None:
        give_up_at = time.monotonic() + timeout_s
        with self._lock:
            self._closing = True
            unreleased, self._unreleased = self._unreleased, []
            self._room.notify()
        for released in unreleased:
            self._release(released)
        self._committer.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout_s)
        self._consumer.close(autocommit=False, timeout_ms=max(0, int((give_up_at - time.monotonic()) * 1000)))
        self._committer.shutdown(wait=True)  # with the consumer closed a commit in flight has failed

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
            if self._is_full() and not self._closing:
                self._room.wait(FULL_POLL_S)

    def _poll(self) -> None:
        """Poll once; while the queue is full only for the group's sake, with everything paused."""
        full = self._is_full()
        assigned = self._consumer.assignment()
        if full:
            self._consumer.pause(*assigned)
        elif self._consumer.paused():
            self._consumer.resume(*self._consumer.paused())
        try:
            with translating():
                polled = self._consumer.poll(timeout_ms=0 if full else int(POLL_S * 1000))
                self._join_on()
                self._look_around()
        except Transient as error:
            log.warning("kafka poll failed, trying again", error=str(error))
            with self._lock:
                self._room.wait(POLL_S)
            return
        if polled:
            with self._lock:
                for partition, records in polled.items():
                    arrived = [_record(Partition(*partition), record) for record in records]
                    self._waiting.extend(arrived)
                    self._waiting_bytes += sum(len(record.value) for record in arrived)
            self._wake()

    def _join_on(self) -> None:
        """Let the next poll go on with a join that this one has not seen the end of.

        kafka-python 3.0.12 forgets one that it began because the topic's partitions had changed (at a first start they
        appear after the first join): the member then has nothing assigned and sends no heartbeats, for ever.
        """
        if self._consumer.group_metadata().state is MemberState.REBALANCING:
            self._consumer._coordinator.request_rejoin()

    def _look_around(self) -> None:
        """On the polling thread, because only there none of the calls can meet a rebalance or block the loop."""
        now = time.monotonic()
        if now < self._look_due:
            return
        self._look_due = now + LOOK_INTERVAL_S
        cluster = self._consumer._cluster
        if cluster.partitions_for_topic(self._topic) is None:
            # kafka-python 3.0.12 forgets that it has to ask for a topic's partitions if it is subscribed to while an
            # earlier question is on its way, asks again after five minutes only, and has nothing assigned till then.
            cluster.request_update()
        beyond = {}
        for partition in self._consumer.assignment():
            end = self._consumer.highwater(partition)
            position = self._consumer.position(partition, timeout_ms=0) if end is not None else None
            if position is not None:
                beyond[Partition(*partition)] = max(0, end - position)
        self._beyond = beyond

    async def note_revocation(self, revoked: set[TopicPartition], *, lost: bool) -> None:
        """Runs on Kafka's IO thread, inside a poll: returns when the loop has released the partitions.

        Also where they are lost: were they assigned again before the loop has dropped its messages, it would take
        the repeated ones for those.
        """
        partitions = frozenset(Partition(*partition) for partition in revoked)
        released = KafkaFuture()
        with self._lock:
            self._waiting = deque(record for record in self._waiting if record.partition not in partitions)
            self._waiting_bytes = sum(len(record.value) for record in self._waiting)
            if self._closing:
                return
            self._unreleased.append(released)
            self._revocations.append(Revocation(partitions, lost, lambda: self._release(released)))
        self._wake()
        await released

    def _release(self, released: KafkaFuture) -> None:
        with self._lock:
            if released in self._unreleased:
                self._unreleased.remove(released)
        if not released.is_done:
            released.success(None)
            # A future set from another thread does not wake Kafka's IO loop; a commit of nothing does.
            with contextlib.suppress(RuntimeError, kafka_errors.KafkaError):  # closed meanwhile: nobody waits any more
                self._consumer.commit({}, timeout_ms=0)


class KafkaOutbox:
    """A producer that waits for all replicas; implements `workers.ports.Outbox`."""

    def __init__(self, connection: Mapping[str, Any], *, max_message_bytes: int, linger_ms: int = 0) -> None:
        self._producer = _started(
            KafkaProducer,
            **connection,
            acks="all",
            # An idempotent producer of kafka-python 3.0 is beyond repair once the broker has refused one message
            # for its size, and fails every other message with it. A repeated message is allowed here.
            enable_idempotence=False,
            max_request_size=max_message_bytes,
            max_block_ms=METADATA_TIMEOUT_MS,
            linger_ms=linger_ms,
        )
        self._known_topics: set[str] = set()
        self._introducer = ThreadPoolExecutor(1, thread_name_prefix="kafka-new-topic")

    def send(self, message: Outgoing) -> Future[None]:
        sent: Future[None] = Future()
        if message.topic in self._known_topics:
            self._send(message, sent)
        else:
            # The first message to a topic blocks until its partitions are known: not on the loop's thread.
            self._introducer.submit(self._send, message, sent)
        return sent

    def _send(self, message: Outgoing, sent: Future[None]) -> None:
        try:
            pending = _send(self._producer, message)
        except Exception as error:  # into the future, whatever it is: nobody looks at the introducing thread
            sent.set_exception(translated(error))
        else:
            self._known_topics.add(message.topic)
            pending.add_callback(lambda _: sent.set_result(None))
            pending.add_errback(lambda error: sent.set_exception(translated(error)))

    def close(self, timeout_s: float) -> None:
        self._introducer.shutdown(wait=False, cancel_futures=True)
        _close(self._producer, timeout_s)


class KafkaTransactionalOutbox:
    """A transactional producer whose transactions carry a group's offsets; implements `TransactionalOutbox`."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        *,
        transactional_id: str,
        membership: Callable[[], Any],
        max_message_bytes: int,
        transaction_timeout_ms: int = SESSION_TIMEOUT_MS,
    ) -> None:
        """`membership` gives the consumer's group membership at the moment of each transaction."""
        self._membership = membership
        self._settings = {
            **connection,
            "transactional_id": transactional_id,
            "max_request_size": max_message_bytes,
            "transaction_timeout_ms": transaction_timeout_ms,
        }
        self._producer: Any = self._opened()
        self._outcome: Future[None] = Future()

    def _opened(self) -> Any:
        producer = _started(KafkaProducer, **self._settings)
        try:
            with translating():
                producer.init_transactions()
        except BaseException:
            _close(producer, 0)
            raise
        return producer

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int]) -> None:
        # kafka-python waits for an absent broker without limit: on a thread that `close` can leave behind.
        outcome = self._outcome = Future[None]()
        threading.Thread(
            target=self._settle, args=(outcome, messages, offsets), name="kafka-transaction", daemon=True
        ).start()
        outcome.result()

    def _settle(self, outcome: Future[None], messages: Sequence[Outgoing], offsets: Mapping[Partition, int]) -> None:
        with contextlib.suppress(InvalidStateError):  # closed meanwhile
            try:
                self._publish(messages, offsets)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

    def _publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int]) -> None:
        # Before the first message: with a later membership, offsets of partitions that have moved meanwhile would pass.
        membership = self._membership()
        if membership.generation_id < 0:
            # The broker takes the offsets of a transaction that names no generation from anybody.
            raise Transient("this worker is not a member of its group now")
        with translating():
            with self._transaction() as producer:
                refused = _flush(producer, messages)
                if not refused:
                    producer.send_offsets_to_transaction(_kafka_offsets(offsets), membership)
                    _commit(producer)
                    return
                self._give_up()
            raise self._too_large(messages, refused)

    def _too_large(self, messages: Sequence[Outgoing], refused: Sequence[int]) -> WorkerError:
        """Find which of them it was: one refused message fails all that are sent with it with its own error."""
        for number in sorted(refused, key=lambda number: len(messages[number].value), reverse=True):
            with self._transaction() as producer:
                is_refused = bool(_flush(producer, [messages[number]]))
                self._give_up()
            if is_refused:
                return TooLarge(f"the broker refuses a message of {len(messages[number].value)} bytes", number)
        return Transient("the broker refused a message for its size, and then did not")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """Begin one, and abort it where the block fails."""
        if self._producer is None:
            self._producer = self._opened()
        try:
            self._producer.begin_transaction()
            yield self._producer
        except BaseException as error:
            self._give_up()
            if type(error) is kafka_errors.KafkaError:
                # All that kafka-python says of a producer in a state it cannot leave; the next one starts anew.
                raise Transient(str(error)) from error
            raise

    def _give_up(self) -> None:
        """Abort, and start a new producer at the next attempt.

        kafka-python goes on counting from the numbers of refused messages, which the broker has not seen; and where
        the abort fails, the start of the new producer aborts for it.
        """
        producer, self._producer = self._producer, None
        try:
            producer.abort_transaction()
        except kafka_errors.KafkaError as error:
            log.warning("transaction could not be aborted by its producer", error=str(error))
        _close(producer, 0)

    def close(self, timeout_s: float) -> None:
        producer = self._producer
        if producer is not None:
            _close(producer, timeout_s)
        if not self._outcome.done():
            with contextlib.suppress(InvalidStateError):  # it was done just now
                self._outcome.set_exception(Transient("the worker ends while a transaction is open"))


def _commit(producer: Any) -> None:
    try:
        producer.commit_transaction()
    except kafka_errors.KafkaError as error:
        if isinstance(error, _REBALANCING):
            raise
        # Trying again could publish twice. A restart reads from the offsets whether it was committed.
        raise RuntimeError(f"whether a transaction was committed is not known: {error}") from error


def _flush(producer: Any, messages: Sequence[Outgoing]) -> list[int]:
    """Send and wait; returns the numbers of those that failed with a refusal for size. Raises for any other."""
    futures = []
    for number, message in enumerate(messages):
        try:
            futures.append(_send(producer, message))
        except _TOO_LARGE as error:
            raise TooLarge(str(error), number) from error
    producer.flush()
    refused = [number for number, future in enumerate(futures) if isinstance(future.exception, _TOO_LARGE)]
    for future in futures:
        if future.exception is not None and not refused:
            raise future.exception  # not every lost message fails the transaction that it is lost from
    return refused


def _close(producer: Any, timeout_s: float) -> None:
    try:
        producer.close(timeout=timeout_s)
    except kafka_errors.KafkaTimeoutError:
        producer._sender.force_close()  # `close` gives up when it cannot flush in time, and leaves its thread behind


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

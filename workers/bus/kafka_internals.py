"""Every use of a kafka-python 3.0 name that is not public, each with the reason for it.

The rest of `workers.bus` uses public names only. `PRIVATE_NAMES` lists what is used here; a test names the first one
that a new release of kafka-python has moved.
"""

from __future__ import annotations

import gzip
import io
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import kafka.errors as kafka_errors
import structlog
from kafka import KafkaConsumer, KafkaProducer, TopicPartition, codec
from kafka.consumer.fetcher import Fetcher
from kafka.net.compat import KafkaNetClient
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.structs import MemberState, OffsetAndMetadata

log = structlog.get_logger(__name__)

#: By module and class, the attributes that this file uses.
PRIVATE_NAMES: Mapping[str, tuple[str, ...]] = {
    "kafka.net.compat.KafkaNetClient": ("_manager",),
    "kafka.net.manager.KafkaConnectionManager": ("get_connection", "cluster"),
    "kafka.net.connection.KafkaConnection": ("init_future",),
    "kafka.consumer.group.KafkaConsumer": ("_cluster", "_coordinator", "_fetcher"),
    "kafka.consumer.fetcher.Fetcher": ("_next_partition_records", "PartitionRecords"),
    "kafka.consumer.fetcher.Fetcher.PartitionRecords": (
        "take",
        "record_iterator",
        "_next_inline_exception",
        "_maybe_raise_next_inline_exception",
    ),
    "kafka.coordinator.consumer.ConsumerCoordinator": ("fetch_committed_offsets", "need_rejoin", "request_rejoin"),
    "kafka.cluster.ClusterMetadata": (
        "_last_successful_refresh_ms",
        "_topics",
        "config",
        "partitions_for_topic",
        "request_update",
        "topic_id",
        "topics",
        "unauthorized_topics",
    ),
    "kafka.producer.kafka.KafkaProducer": ("_metadata", "_sender", "_transaction_manager"),
    "kafka.producer.sender.Sender": ("force_close", "wakeup"),
    "kafka.producer.transaction_manager.TransactionManager": (
        "begin_abort",
        "begin_commit",
        "send_offsets_to_transaction",
    ),
    "kafka.record.default_records.DefaultRecordBatch": (
        "_assert_has_codec",
        "_buffer",
        "_decompressed",
        "_maybe_uncompress",
        "_next_record_index",
        "_num_records",
        "_pos",
    ),
}

#: After so many connections ended by the broker before the first one was ready (about two seconds), starting fails.
MAX_HANG_UPS = 5
HANG_UP = "the broker ends every connection before it is ready; check the credentials and KAFKA_SECURITY_PROTOCOL"

# --- connections ------------------------------------------------------------------------------------------------------


def make_client(kind: Any, refusals: tuple[type[BaseException], ...], **settings: Any) -> Any:
    """Return a client that creates no topics.

    Raises errors of the classes in `refusals` at once, and leaves nothing open when it fails: kafka-python retries
    refused credentials until its timeout, and a client that fails to start leaves its thread and its sockets behind.
    Its option `allow_auto_create_topics` has no effect: a broker with `auto.create.topics.enable`, Kafka's default,
    would create every reply topic that a request names.
    """
    nets: list[KafkaNetClient] = []

    def watched(**net_settings: Any) -> KafkaNetClient:
        net = KafkaNetClient(**net_settings)
        nets.append(net)
        net._manager.cluster.config["allow_auto_create_topics"] = False
        _raise_refusals(net, refusals)
        return net

    if "metrics_enabled" in kind.DEFAULT_CONFIG:  # not in the admin client's
        settings["metrics_enabled"] = False
    try:
        client = kind(**settings, kafka_client=watched)
    except BaseException:
        for net in nets:
            net.close()
        raise
    for net in nets:
        del net._manager.get_connection  # only for the start: a later refusal may come from a broker that is starting
    return client


def _raise_refusals(net: KafkaNetClient, refusals: tuple[type[BaseException], ...]) -> None:
    connect = net._manager.get_connection
    refused: list[BaseException] = []
    hang_ups: list[BaseException] = []

    def note(error: BaseException) -> None:
        if isinstance(error, refusals):
            refused.append(error)
        elif "socket disconnected" in str(error):
            # After a refused password kafka-python often sees only a closed connection.
            hang_ups.append(error)
            if len(hang_ups) == MAX_HANG_UPS:
                refused.append(kafka_errors.KafkaConfigurationError(HANG_UP))

    def connect_and_watch(*node: Any, **options: Any) -> Any:
        if refused:
            raise refused[0]
        connection = connect(*node, **options)
        connection.init_future.add_errback(note)
        return connection

    net._manager.get_connection = connect_and_watch


# --- metadata ---------------------------------------------------------------------------------------------------------


def topic_id(consumer: KafkaConsumer, topic: str) -> str:
    """Return the broker's id of a topic, "" if unknown. A topic that is deleted and created again gets a new id.

    No public call returns the id, and an offset of the old topic looks valid in the new topic.
    """
    found = consumer._cluster.topic_id(topic)
    return "" if found is None else str(found)


def seconds_since_contact(consumer: KafkaConsumer) -> float:
    """Seconds since a broker last answered a request for metadata, which the client repeats by itself.

    No public call reports whether a broker answers.
    """
    last_answer_ms: float = consumer._cluster._last_successful_refresh_ms
    return time.monotonic() - last_answer_ms / 1000


def request_unknown_partitions(consumer: KafkaConsumer, topic: str) -> None:
    """Ask for the partitions of a subscribed topic, unless they are known.

    kafka-python does not ask if a topic is subscribed to while an earlier request is in flight; it asks again only
    at the next refresh.
    """
    if consumer._cluster.partitions_for_topic(topic) is None:
        consumer._cluster.request_update()


def is_topic_known(producer: KafkaProducer, topic: str) -> bool:
    """Whether a producer takes messages to this topic without waiting for metadata. Internal topics are never known."""
    return topic in producer._metadata.topics()


def is_topic_unauthorized(producer: KafkaProducer, topic: str) -> bool:
    """Whether the latest metadata report that this client may not describe the topic."""
    return topic in producer._metadata.unauthorized_topics


def request_topics(producer: KafkaProducer, topics: Collection[str], limit_s: float) -> bool:
    """Request metadata of these topics and wait at most `limit_s`; returns whether a broker has answered.

    `KafkaProducer.send` blocks on an unknown topic, and fails in the same way for a missing topic and a missing broker.
    """
    cluster = producer._metadata
    cluster._topics = cluster._topics | set(topics)  # a new set: Kafka's thread may be reading the old one
    last_answer_ms = cluster._last_successful_refresh_ms
    ended = threading.Event()
    cluster.request_update().add_both(lambda _: ended.set())
    producer._sender.wakeup()
    ended.wait(limit_s)
    # Not by the future's result, which for a single topic is that topic's error.
    return bool(cluster._last_successful_refresh_ms > last_answer_ms)


def forget_topics(producer: KafkaProducer, topics: Collection[str]) -> None:
    """Stop requesting these topics: while one is missing, kafka-python requests it ten times a second."""
    cluster = producer._metadata
    cluster._topics = cluster._topics - set(topics)


# --- group membership -------------------------------------------------------------------------------------------------


def is_stable(consumer: KafkaConsumer) -> bool:
    """Whether this member has its assignment."""
    return bool(consumer.group_metadata().state is MemberState.STABLE)


def is_joining(consumer: KafkaConsumer) -> bool:
    """Whether a join has begun. Until it ends, polls must follow each other, each with a timeout.

    A join that ends between two polls, or in a poll without a timeout, is lost, and the whole group begins again.
    """
    return bool(consumer.group_metadata().state is MemberState.REBALANCING)


def has_to_join(consumer: KafkaConsumer) -> bool:
    """Whether the next poll begins a join. No public call reports this, and a draining member must not begin one."""
    return bool(consumer._coordinator.need_rejoin())


def continue_join(consumer: KafkaConsumer) -> None:
    """Make the next poll continue a join that the last poll did not finish.

    kafka-python forgets a join that began because the topic's partitions had changed (at a first start they appear
    after the first join). The member then has no assignment and sends no heartbeats.
    """
    if is_joining(consumer):
        consumer._coordinator.request_rejoin()


def committed_offsets(
    consumer: KafkaConsumer, partitions: Iterable[TopicPartition], limit_s: float
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Return the group's committed offsets with metadata in one request; the public call makes one per partition."""
    found: dict[TopicPartition, OffsetAndMetadata] = consumer._coordinator.fetch_committed_offsets(
        list(partitions), timeout_ms=int(limit_s * 1000)
    )
    return found


# --- producers --------------------------------------------------------------------------------------------------------


def close_producer(producer: KafkaProducer, timeout_s: float) -> None:
    """Close a producer. Its own `close` leaves its thread behind when it cannot flush in time."""
    try:
        producer.close(timeout=timeout_s)
    except kafka_errors.KafkaTimeoutError:
        producer._sender.force_close()


def send_offsets(
    producer: KafkaProducer, offsets: Mapping[TopicPartition, OffsetAndMetadata], membership: Any, limit_s: float
) -> None:
    """Add offsets to the transaction. Waits at most `limit_s`; the public call may wait for ever."""
    _await_coordinator(
        producer, producer._transaction_manager.send_offsets_to_transaction(dict(offsets), membership), limit_s
    )


def commit_transaction(producer: KafkaProducer, limit_s: float) -> None:
    """Commit the transaction. Waits at most `limit_s`; the public call may wait for ever."""
    _await_coordinator(producer, producer._transaction_manager.begin_commit(), limit_s)


def abort_transaction(producer: KafkaProducer, limit_s: float) -> None:
    """Abort the transaction. Waits at most `limit_s`; the public call may wait for ever."""
    _await_coordinator(producer, producer._transaction_manager.begin_abort(), limit_s)


def _await_coordinator(producer: KafkaProducer, request: Any, limit_s: float) -> None:
    # After an outage kafka-python may have lost the request; then no answer ever comes.
    producer._sender.wakeup()
    if not request.wait(limit_s * 1000):
        raise kafka_errors.KafkaTimeoutError(f"no answer of the transaction's coordinator in {limit_s:g} s")


# --- records ----------------------------------------------------------------------------------------------------------

#: The header of an empty record that replaces unreadable records; its value is the reason.
UNREADABLE_HEADER = "unreadable"


@dataclass(slots=True)
class PollBudget:
    """The bytes of records that one poll may still return, and the size limit of a decompressed batch."""

    max_bytes: int
    max_batch_bytes: int
    left: int = 0


class PollIsFull(Exception):
    """Raised once by the poll after one that used up its budget; that one returned the records it had read."""


def install_tolerant_records(consumer: KafkaConsumer, budget: PollBudget) -> None:
    """Make a consumer tolerate invalid records of other clients, and limit the bytes of a poll.

    kafka-python treats a header name that is not UTF-8 as a corrupt record, never returns from a poll after a batch
    that it cannot read, and decompresses batches of any size. Here such a name gets replacement characters,
    as in Java's client, and one empty record with `UNREADABLE_HEADER` replaces records that cannot be read.
    """
    consumer._fetcher.PartitionRecords = partial(_PartitionRecords, budget)


def clear_exhausted_partition(consumer: KafkaConsumer) -> None:
    """Clear an exhausted current partition. Call before each poll of a consumer that pauses partitions.

    kafka-python sets aside the fetched records of a paused partition. It restores them only when the current partition
    is None, not when it is an exhausted one, and meanwhile does not fetch that partition again.
    """
    fetcher = consumer._fetcher
    if not fetcher._next_partition_records:
        fetcher._next_partition_records = None


class _PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # kafka-python has no types
    """The fetched records of one partition."""

    def __init__(self, budget: PollBudget, fetch_offset: int, partition: Any, records: Any, **settings: Any) -> None:
        self._budget = budget
        super().__init__(fetch_offset, partition, _Batches(records, budget.max_batch_bytes), **settings)

    def take(self, number: int | None = None) -> Any:
        self._maybe_raise_next_inline_exception()
        taken: list[Any] = []
        while self.record_iterator is not None and (number is None or len(taken) < number):
            if self._budget.left <= 0:
                if not taken:
                    raise PollIsFull
                return taken
            try:
                record = next(self.record_iterator)
            except StopIteration:
                break
            except Exception as error:
                self.drain()
                if not taken:
                    raise
                self._next_inline_exception = error
                return taken
            taken.append(record)
            self._budget.left -= len(record.value or b"") + len(record.key or b"")
        return taken


class _Batches:
    """The batches of a fetch, each wrapped as a `_Batch`."""

    def __init__(self, records: Any, max_bytes: int) -> None:
        self._records = records
        self._max_bytes = max_bytes

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        return _Batch(batch._buffer, self._max_bytes) if isinstance(batch, DefaultRecordBatch) else batch


class _Batch(DefaultRecordBatch):  # type: ignore[misc]
    """A batch that continues after an undecodable header name, and limits its decompressed size."""

    _buffer: bytearray
    _pos: int
    _next_record_index: int
    _num_records: int
    _decompressed: bool

    def __init__(self, buffer: Any, max_bytes: int) -> None:
        super().__init__(buffer)
        self._max_bytes = max_bytes
        self._unreadable: str | None = None

    def validate_crc(self) -> bool:
        if not super().validate_crc():
            self._unreadable = "the checksum is wrong"
        return True

    def _maybe_uncompress(self) -> None:
        try:
            self._uncompress()
        except Exception as error:  # each compression library raises its own classes
            self._unreadable = f"it cannot be decompressed: {error}"

    def _uncompress(self) -> None:
        if self._decompressed or self._unreadable or self.compression_type not in _UNPACKERS:
            super()._maybe_uncompress()
            return
        self._assert_has_codec(self.compression_type)
        packed = io.BytesIO(memoryview(self._buffer)[self._pos :])
        with _UNPACKERS[self.compression_type](packed) as unpacking:
            self._buffer = bytearray(unpacking.read(self._max_bytes + 1))
        if len(self._buffer) > self._max_bytes:
            self._unreadable = f"it has more than {self._max_bytes} bytes once decompressed"
        self._pos, self._decompressed = 0, True

    def __next__(self) -> Any:
        if self._unreadable is not None:
            return self._stand_in(self._unreadable)
        try:
            return super().__next__()
        except kafka_errors.CorruptRecordError as error:
            if isinstance(error.__context__, UnicodeDecodeError):
                # The position in the batch has not moved: this reads the same record again.
                self._buffer = _ReplacingBuffer(self._buffer)
                return super().__next__()
            self._unreadable = str(error)
            return self._stand_in(self._unreadable)

    def _stand_in(self, reason: str) -> DefaultRecord:
        """Return one empty record in place of the rest of the batch, which may have a hundred million records."""
        if self._next_record_index >= self.records_count:
            raise StopIteration
        self._next_record_index = self._num_records = self.records_count
        self._buffer, self._pos = bytearray(), 0
        sentence = f"records of the batch at offsets {self.base_offset} to {self.last_offset} cannot be read: {reason}"
        log.error("unreadable records", reason=sentence)
        headers = [(UNREADABLE_HEADER, sentence.encode())]
        return DefaultRecord(0, self.last_offset, self.first_timestamp, self.timestamp_type, None, b"", headers)


#: Snappy is left to kafka-python: it expands one byte to at most some twenty.
_UNPACKERS: dict[int, Callable[[io.BytesIO], Any]] = {
    DefaultRecordBatch.CODEC_GZIP: lambda packed: gzip.GzipFile(fileobj=packed),
    DefaultRecordBatch.CODEC_LZ4: lambda packed: codec.lz4.LZ4FrameFile(packed),
    DefaultRecordBatch.CODEC_ZSTD: lambda packed: codec.zstd.ZstdDecompressor().stream_reader(
        packed, read_across_frames=True
    ),
}


class _ReplacingBuffer(bytearray):
    """Bytes that decode with replacement characters; in a batch, only header names are decoded."""

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return _ReplacingBuffer(part) if isinstance(index, slice) else part

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, errors)

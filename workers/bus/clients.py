"""Starts Kafka's clients, ends producers, and turns records and offsets into its types and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kafka.errors as kafka_errors
from kafka import KafkaProducer, TopicPartition
from kafka.net.compat import KafkaNetClient
from kafka.structs import OffsetAndMetadata

from workers.bus.errors import MISCONFIGURED, translated
from workers.errors import TopicRefused, Transient
from workers.ports import Outgoing, Partition, Poll, Record

#: How soon clients notice new partitions and topics that were created again; the client's own default is five minutes.
METADATA_MAX_AGE_MS = 3_000
#: The broker hung up this often before a first connection was ready: it does so at once, in about two seconds in all.
MAX_CUT_OFF = 5
CUT_OFF = "the broker ends every connection before it is ready; is it the credentials, or the security protocol?"


def connecting(make: Callable[[], Any]) -> Any:
    """Make a client, or raise what starting without a broker means."""
    try:
        return make()
    except kafka_errors.KafkaError as error:
        known = translated(error)
        raise known if known is not error else Transient(f"no Kafka broker answers: {error}") from error


def started(kind: Callable[..., Any], **settings: Any) -> Any:
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
            if isinstance(error, MISCONFIGURED):
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
        client = connecting(lambda: kind(**settings, kafka_client=watched, metrics_enabled=False))
    except BaseException:
        for net in nets:
            net.close()
        raise
    for net in nets:
        del net._manager.get_connection  # later on, a broker that refuses may be one that is still starting
    return client


def close_producer(producer: Any, timeout_s: float) -> None:
    try:
        producer.close(timeout=timeout_s)
    except kafka_errors.KafkaTimeoutError:
        producer._sender.force_close()  # `close` gives up when it cannot flush in time, and leaves its thread behind


def send_to(producer: KafkaProducer, message: Outgoing) -> Any:
    """Hand a message to the producer. Raises `TopicRefused` for a partition that the topic does not have."""
    key = message.key
    if key is None and message.value is None:
        key = b""  # kafka-python refuses a message with neither, which a dead letter may be
    try:
        return producer.send(
            message.topic, value=message.value, key=key, headers=list(message.headers), partition=message.partition
        )
    except ValueError as error:
        raise TopicRefused(f"the topic {message.topic} does not take the message: {error}") from error


def kafka_offsets(offsets: Mapping[Partition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {TopicPartition(*partition): OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}


def to_record(partition: Partition, record: Any, poll: Poll | None = None) -> Record:
    """Return our form of a consumed record; a null header becomes empty."""
    return Record(
        partition=partition,
        offset=record.offset,
        key=record.key,
        value=record.value,
        headers=tuple((name, value if value is not None else b"") for name, value in record.headers),
        timestamp_ms=record.timestamp,
        poll=poll,
    )

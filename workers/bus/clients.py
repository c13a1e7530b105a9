"""Starts Kafka's clients, and converts records and offsets between kafka-python's types and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kafka.errors as kafka_errors
from kafka import KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from workers.bus.errors import MISCONFIGURED, translated
from workers.bus.kafka_internals import make_client
from workers.errors import TopicRefused, Transient
from workers.ports import Commit, Outgoing, Partition, Poll, Record

#: How soon clients notice new partitions and topics that were created again; the client's own default is five minutes.
METADATA_MAX_AGE_MS = 3_000
#: How long one attempt to start a client waits for a broker; the caller tries again.
BOOTSTRAP_MS = 10_000


def started(kind: Any, **settings: Any) -> Any:
    """Start a client of this kind. Raises `Transient` while no broker answers, `Misconfigured` for refusals."""
    try:
        return make_client(
            kind,
            MISCONFIGURED,
            **{"bootstrap_timeout_ms": BOOTSTRAP_MS, "metadata_max_age_ms": METADATA_MAX_AGE_MS, **settings},
        )
    except kafka_errors.KafkaError as error:
        known = translated(error)
        raise known if known is not error else Transient(f"no Kafka broker answers: {error}") from error


def send_to(producer: KafkaProducer, message: Outgoing) -> Any:
    """Pass a message to the producer. Raises `TopicRefused` for a partition that the topic does not have."""
    key = message.key
    if key is None and message.value is None:
        key = b""  # kafka-python refuses a message without key and value; a dead letter may be one
    try:
        return producer.send(
            message.topic, value=message.value, key=key, headers=list(message.headers), partition=message.partition
        )
    except ValueError as error:
        raise TopicRefused(f"the topic {message.topic} does not take the message: {error}") from error


def kafka_offsets(commits: Mapping[Partition, Commit]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {
        TopicPartition(*partition): OffsetAndMetadata(commit.offset, commit.metadata, -1)
        for partition, commit in commits.items()
    }


def to_record(partition: Partition, record: Any, epoch: int = 0, poll: Poll | None = None) -> Record:
    """Return a consumed record as a `Record`; a null header value becomes empty."""
    return Record(
        partition=partition,
        offset=record.offset,
        key=record.key,
        value=record.value,
        headers=tuple((name, value if value is not None else b"") for name, value in record.headers),
        timestamp_ms=record.timestamp,
        epoch=epoch,
        poll=poll,
    )

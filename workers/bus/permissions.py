"""Checks, before a worker is ready, that its topics exist and that it may read and write them.

A broker that reports no permissions (it has no ACLs, or is not Apache Kafka) is assumed to allow everything.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping
from typing import Any

import kafka.errors as kafka_errors
from kafka import KafkaAdminClient, KafkaProducer

from workers.bus.clients import started
from workers.bus.errors import translating
from workers.bus.kafka_internals import close_producer, is_topic_known, request_topics
from workers.errors import Misconfigured

#: Time allowed to a broker that creates topics on request.
CREATION_S = 2.0
_ALL = "ALL"


def check_access(
    connection: Mapping[str, Any], *, reads: Collection[str], writes: Collection[str], group_id: str
) -> None:
    """Raise `Misconfigured` unless the topics exist and this client may use them, `Transient` if no broker answers.

    A topic that does not exist is created where the broker creates topics on request.
    """
    topics = list(dict.fromkeys([*reads, *writes]))
    _request_creation(connection, topics)
    with contextlib.closing(started(KafkaAdminClient, **connection)) as admin:
        with translating():
            described = {topic["name"]: topic for topic in admin.describe_topics(topics)}
        for topic in topics:
            operations = (["READ"] if topic in reads else []) + (["WRITE"] if topic in writes else [])
            _check_topic(topic, described.get(topic, {}), operations)
        _check_group(admin, group_id)


def _request_creation(connection: Mapping[str, Any], topics: Collection[str]) -> None:
    """Request the topics' metadata with automatic creation allowed; the broker decides."""
    producer = started(KafkaProducer, **connection, enable_idempotence=False)
    try:
        give_up_at = time.monotonic() + CREATION_S
        while time.monotonic() < give_up_at and not all(is_topic_known(producer, topic) for topic in topics):
            request_topics(producer, topics, 0.5)
    finally:
        close_producer(producer, 0)


def _check_topic(topic: str, described: Mapping[str, Any], operations: Collection[str]) -> None:
    code = described.get("error_code", kafka_errors.UnknownTopicOrPartitionError.errno)
    if code == kafka_errors.TopicAuthorizationFailedError.errno:
        raise Misconfigured(f"Kafka refuses this worker: it may not describe the topic {topic}")
    if code == kafka_errors.UnknownTopicOrPartitionError.errno:
        raise Misconfigured(f"the topic {topic} does not exist: create it")
    if code == kafka_errors.InvalidTopicError.errno:
        raise Misconfigured(f"{topic} is not a valid topic name")
    allowed = described.get("authorized_operations") or []
    missing = [operation for operation in operations if allowed and operation not in allowed and _ALL not in allowed]
    if missing:
        raise Misconfigured(f"Kafka refuses this worker: it may not {' and '.join(missing)} the topic {topic}")


def _check_group(admin: KafkaAdminClient, group_id: str) -> None:
    refused = kafka_errors.GroupAuthorizationFailedError
    try:
        with translating():
            described = admin.describe_groups([group_id], include_authorized_operations=True).get(group_id) or {}
    except Misconfigured as error:
        if not isinstance(error.__cause__, refused):
            raise
        described = {"error": refused.__name__}
    allowed = described.get("authorized_operations") or []
    is_refused = refused.__name__ in (described.get("error") or "")
    if is_refused or (allowed and "READ" not in allowed and _ALL not in allowed):
        raise Misconfigured(f"Kafka refuses this worker: it may not READ the group {group_id}")

"""Topics for the length of the demo: made before it, removed after it, so that a borrowed Kafka is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from kafka import KafkaAdminClient
from kafka.errors import KafkaError
from up import topic_names

from protocols.topics import Topics
from server_process import ServiceError

PARTITIONS = 2


@contextlib.contextmanager
def fresh_topics(connection: Mapping[str, Any], topics: Topics) -> Iterator[None]:
    """Make the topics of a prefix that nobody else uses; `connection` is what every client of this broker needs."""
    names = topic_names(topics)
    try:
        admin = KafkaAdminClient(**connection)
    except KafkaError as error:
        raise ServiceError(f"Kafka does not answer: {error}") from error
    try:
        try:
            admin.create_topics({name: {"num_partitions": PARTITIONS} for name in names}, wait_for_metadata=True)
        except KafkaError as error:
            raise ServiceError(f"Kafka does not let the demo make its topics: {error}") from error
        try:
            yield
        finally:
            with contextlib.suppress(KafkaError):  # it has gone, and its topics with it, or somebody else removes them
                admin.delete_topics(names)
    finally:
        admin.close()

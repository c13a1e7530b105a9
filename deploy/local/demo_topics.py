"""Creates topics for the demo and removes them with the groups at the end, so that the user's Kafka stays as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from protocols.topics import Topics
from server_process import ServiceError
from up import topic_names

PARTITIONS = 2


@contextlib.contextmanager
def fresh_topics(connection: Mapping[str, Any], topics: Topics, groups: Sequence[str]) -> Iterator[None]:
    """Create the topics of an unused prefix for the block; remove them and the workers' groups at the end.

    `connection` holds the options of Kafka clients.
    """
    names = topic_names(topics)
    try:
        admin = KafkaAdminClient(**connection)
    except KafkaError as error:
        raise ServiceError(f"Kafka does not answer: {error}") from error
    try:
        try:
            admin.create_topics({name: {"num_partitions": PARTITIONS} for name in names}, wait_for_metadata=True)
        except KafkaError as error:
            raise ServiceError(f"Kafka does not let the demo create its topics: {error}") from error
        try:
            yield
        finally:
            # A failure leaves only unused topics behind, and must not hide why the demo ended.
            with contextlib.suppress(KafkaError):
                admin.delete_topics(names)
                admin.delete_groups(list(groups))
    finally:
        admin.close()

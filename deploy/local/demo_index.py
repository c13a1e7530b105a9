"""Reads the pictures' embeddings from `images.indexed`, as the owner of a vector index would."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from protocols.encoding import content_type_of, decode
from protocols.events import ImageIndexed
from protocols.topics import Topics
from server_process import ServiceError
from workers.bus.reader import KafkaReader

READ_LIMIT_S = 60.0
POLL_S = 0.5


def published_embeddings(connection: Mapping[str, Any], topics: Topics) -> dict[str, list[float]]:
    """Return the pooled embedding of every indexed image by id; `connection` holds the options of Kafka clients.

    An image that was stored before is not encoded again, so it has no embedding here.
    """
    embeddings: dict[str, list[float]] = {}
    reader = KafkaReader(connection, [topics.images_indexed], start="beginning")
    give_up_at = time.monotonic() + READ_LIMIT_S
    try:
        while not reader.caught_up():
            if time.monotonic() > give_up_at:
                raise ServiceError(f"{topics.images_indexed} was not read to its end within {READ_LIMIT_S:g} s")
            for record in reader.poll(POLL_S):
                event = decode(ImageIndexed, record.value, content_type_of(record.headers))
                if event.embedding is not None:
                    embeddings[event.image_id] = event.embedding
    finally:
        reader.close()
    return embeddings

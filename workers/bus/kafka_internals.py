"""Every use of a kafka-python name that is not public, each with the reason for it.

The rest of `workers.bus` uses public names only. `tests/workers/bus/test_kafka_internals.py` names the first private
name that a new release of kafka-python has moved.
"""

from __future__ import annotations

import time
from typing import Any

from kafka import KafkaConsumer


def topic_id(consumer: KafkaConsumer, topic: str) -> Any:
    """The broker's identity of a topic, None if it is unknown. A topic that is deleted and created again has a new one.

    No public call returns it, and a position in the old topic looks valid in the new one.
    """
    return consumer._cluster.topic_id(topic)


def seconds_since_contact(consumer: KafkaConsumer) -> float:
    """Seconds since a broker last answered a request for metadata, which the client repeats by itself.

    No public call reports whether a broker answers.
    """
    last_answer_ms: float = consumer._cluster._last_successful_refresh_ms
    return time.monotonic() - last_answer_ms / 1000

"""How many messages of a member's partitions it has not polled yet, looked up now and then.

On the thread that polls, because only there none of the calls can meet a rebalance or block the loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import kafka.errors as kafka_errors
from kafka import KafkaConsumer

from workers.ports import Partition

#: How often it is looked up: it is for people and autoscalers, and costs a small request.
LOOK_INTERVAL_S = 1.0
#: A broker that has not answered by then is asked again the next time.
LOOK_TIMEOUT_S = 1.0


class LagLook:
    """What was found the last time; may be read from any thread."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer
        self._due = 0.0
        self.beyond: Mapping[Partition, int] = {}

    def is_due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() >= self._due

    def look(self) -> None:
        """Ask the broker; without its answer what was found before stays."""
        self._due = time.monotonic() + LOOK_INTERVAL_S
        # Asked for, because what fetches tell of them stands still while partitions are paused: when work piles up.
        assigned = self._consumer.assignment()
        try:
            ends = self._consumer.end_offsets(assigned, timeout_ms=int(LOOK_TIMEOUT_S * 1000)) if assigned else {}
        except kafka_errors.KafkaTimeoutError:
            return
        beyond = {}
        for partition, end in ends.items():
            position = self._consumer.position(partition, timeout_ms=0)
            if position is not None:
                beyond[Partition(*partition)] = max(0, end - position)
        self.beyond = beyond

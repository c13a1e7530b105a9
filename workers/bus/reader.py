"""Reads topics of Kafka without a group: what a client needs to see its answers, and a tool to look at a topic.

Where reading starts is fixed when the reader is made, so whatever is published after that is seen.
Nothing is committed. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from kafka import KafkaConsumer, TopicPartition

from workers.bus.clients import started, to_record
from workers.bus.errors import translating
from workers.bus.records import read_forgivingly
from workers.ports import Partition, Record

Start = Literal["end", "beginning"] | datetime

#: How often a topic that did not exist, and partitions that were added, are looked for.
DISCOVERY_S = 0.5
OFFSETS_TIMEOUT_MS = 30_000


class KafkaReader:
    """Every record of some topics from a start on, in the order of each partition."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        topics: Sequence[str],
        *,
        start: Start = "end",
        read_committed: bool = True,
        max_message_bytes: int = 1 << 20,
    ) -> None:
        """`connection` is what every client of this broker needs.

        A topic that does not exist yet is read from its beginning once it does; an instant stands for the first record
        that is not older. `read_committed` sees nothing of a transaction that is open or was aborted.
        """
        self._topics = tuple(topics)
        self._consumer = started(
            KafkaConsumer,
            **connection,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # what retention has removed meanwhile is skipped
            isolation_level="read_committed" if read_committed else "read_uncommitted",
            allow_auto_create_topics=False,  # asking for a name must not make a topic of it
            max_partition_fetch_bytes=max(1 << 20, max_message_bytes + (64 << 10)),
        )
        read_forgivingly(self._consumer)
        try:
            with translating():
                found = self._partitions()
                self._ends = dict(self._consumer.end_offsets(found, timeout_ms=OFFSETS_TIMEOUT_MS)) if found else {}
                self._consumer.assign(found)
                for partition, offset in self._first_offsets(found, start).items():
                    self._consumer.seek(partition, offset)
        except BaseException:
            self._consumer.close()
            raise
        self._next_discovery_at = time.monotonic() + DISCOVERY_S

    def poll(self, timeout_s: float) -> list[Record]:
        """Return what has arrived, waiting at most this long for the first record."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            self._discover()
            left_s = max(0.0, give_up_at - time.monotonic())
            with translating():
                polled = self._consumer.poll(timeout_ms=int(min(left_s, DISCOVERY_S) * 1000))
            records = [
                to_record(Partition(*partition), record) for partition, found in polled.items() for record in found
            ]
            if records or time.monotonic() >= give_up_at:
                return records

    def caught_up(self) -> bool:
        """Whether everything that was there when the reader was made has been read."""
        with translating():
            return all(self._consumer.position(partition) >= end for partition, end in self._ends.items())

    def unknown_topics(self) -> list[str]:
        """The topics that have not been seen to exist."""
        known = {partition.topic for partition in self._consumer.assignment()}
        return [topic for topic in self._topics if topic not in known]

    def close(self) -> None:
        self._consumer.close(autocommit=False)

    def _partitions(self) -> list[TopicPartition]:
        return [
            TopicPartition(topic, number)
            for topic in self._topics
            for number in sorted(self._consumer.partitions_for_topic(topic))
        ]

    def _first_offsets(self, partitions: Sequence[TopicPartition], start: Start) -> dict[TopicPartition, int]:
        if not partitions or start == "end":
            return dict(self._ends)
        beginnings = dict(self._consumer.beginning_offsets(partitions, timeout_ms=OFFSETS_TIMEOUT_MS))
        if start == "beginning":
            return beginnings
        start_ms = int(start.timestamp() * 1000)
        found = self._consumer.offsets_for_times(dict.fromkeys(partitions, start_ms), timeout_ms=OFFSETS_TIMEOUT_MS)
        # Nothing that young in a partition: whatever comes next is.
        return {partition: at.offset if at is not None else self._ends[partition] for partition, at in found.items()}

    def _discover(self) -> None:
        """Take up partitions that have appeared since; all they hold is younger than this reader."""
        if time.monotonic() < self._next_discovery_at:
            return
        with translating():
            assigned = self._consumer.assignment()
            found = self._partitions()
            added = [partition for partition in found if partition not in assigned]
            if added:
                self._consumer.assign([*assigned, *added])
                self._consumer.seek_to_beginning(*added)
        self._next_discovery_at = time.monotonic() + DISCOVERY_S

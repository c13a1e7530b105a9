"""Reads topics of Kafka without a group: for a client that waits for replies, for tools and for the follower.

The start is fixed when the reader is made, so every record published later is read. Commits nothing.
Knows nothing of what the records mean.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import kafka.errors as kafka_errors
from kafka import KafkaConsumer, TopicPartition

from workers.bus.clients import started, to_record
from workers.bus.consumer import MAX_BATCH_BYTES, MAX_POLL_BYTES
from workers.bus.errors import translating
from workers.bus.kafka_internals import (
    PollBudget,
    PollIsFull,
    install_tolerant_records,
    seconds_since_contact,
    topic_id,
)
from workers.ports import Gap, Partition, Record

Start = Literal["end", "beginning"] | datetime

#: Interval at which the reader looks for new topics and partitions.
DISCOVERY_S = 0.5
OFFSETS_TIMEOUT_MS = 30_000
#: After a longer silence, compaction may have removed tombstones that were not read (`delete.retention.ms`: 24 hours).
MAX_SILENCE_S = 3600.0
#: Reasons of a gap.
REMOVED = "the broker removed records before they were read"
TRUNCATED = "the broker lost records that had been read"
RECREATED = "the topic was deleted and created again"
SILENCE = "no broker answered for so long that records may have been compacted"


class KafkaReader:
    """Reads every record of some topics from a start on, in the order of each partition."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        topics: Sequence[str],
        *,
        partitions: Collection[int] | None = None,
        start: Start = "end",
        read_committed: bool = True,
        max_message_bytes: int = 1 << 20,
    ) -> None:
        """`connection` holds the settings that every client of this broker needs.

        Reads these partitions of each topic, or all. A topic or partition that is created later is read from its
        beginning. A time as `start` means the first record that is not older. `read_committed` hides the records of
        transactions that are open or aborted.
        """
        self._topics = tuple(topics)
        self._wanted = partitions
        self._consumer = started(
            KafkaConsumer,
            **connection,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",  # a position that is no longer valid is an error, which becomes a gap
            isolation_level="read_committed" if read_committed else "read_uncommitted",
            max_partition_fetch_bytes=max(1 << 20, max_message_bytes + (64 << 10)),
        )
        self._budget = PollBudget(MAX_POLL_BYTES, max(MAX_BATCH_BYTES, max_message_bytes))
        install_tolerant_records(self._consumer, self._budget)
        self._gaps: list[Gap] = []
        try:
            with translating():
                found = self._partitions()
                self._ends = dict(self._consumer.end_offsets(found, timeout_ms=OFFSETS_TIMEOUT_MS)) if found else {}
                self._consumer.assign(found)
                for partition, offset in self._first_offsets(found, start).items():
                    self._consumer.seek(partition, offset)
                self._topic_ids = {topic: topic_id(self._consumer, topic) for topic in self._topics}
        except BaseException:
            self._consumer.close()
            raise
        self._next_discovery_at = time.monotonic() + DISCOVERY_S
        self._longest_silence_s = 0.0

    def poll(self, timeout_s: float) -> list[Record]:
        """Return the records that have arrived, waiting at most this long for the first one."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            self._discover()
            left_s = max(0.0, give_up_at - time.monotonic())
            records = self._poll_once(min(left_s, DISCOVERY_S))
            if records or self._gaps or time.monotonic() >= give_up_at:
                return records

    def gaps(self) -> list[Gap]:
        """Return the gaps found since the last call; they lie before the records of the next poll."""
        gaps, self._gaps = self._gaps, []
        return gaps

    def caught_up(self) -> bool:
        """Whether everything that existed when the reader was made has been read."""
        with translating():
            return all(self._consumer.position(partition) >= end for partition, end in self._ends.items())

    def unknown_topics(self) -> list[str]:
        """Return the topics that do not exist, as far as the reader knows."""
        known = {partition.topic for partition in self._consumer.assignment()}
        return [topic for topic in self._topics if topic not in known]

    def close(self) -> None:
        self._consumer.close(autocommit=False)

    def _poll_once(self, timeout_s: float) -> list[Record]:
        self._budget.left = self._budget.max_bytes
        with translating():
            try:
                polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000))
            except PollIsFull:  # of the poll before
                return []
            except kafka_errors.OffsetOutOfRangeError as error:
                self._restart(error.args[0], REMOVED)
                return []
            except kafka_errors.LogTruncationError as error:
                self._restart(error.divergent_offsets, TRUNCATED)
                return []
        return [to_record(Partition(*partition), record) for partition, found in polled.items() for record in found]

    def _restart(self, partitions: Collection[TopicPartition], reason: str) -> None:
        """Continue at the oldest record, or at the end if the partition now ends before the read position."""
        beginnings = self._consumer.beginning_offsets(partitions, timeout_ms=OFFSETS_TIMEOUT_MS)
        ends = self._consumer.end_offsets(partitions, timeout_ms=OFFSETS_TIMEOUT_MS)
        for partition in partitions:
            is_behind = self._consumer.position(partition) < beginnings[partition] or reason == RECREATED
            offset = (beginnings if is_behind else ends)[partition]
            self._consumer.seek(partition, offset)
            self._ends[partition] = min(self._ends.get(partition, ends[partition]), ends[partition])
            self._gaps.append(Gap(Partition(*partition), reason if is_behind else TRUNCATED))

    def _partitions(self) -> list[TopicPartition]:
        return [
            TopicPartition(topic, number)
            for topic in self._topics
            for number in sorted(self._consumer.partitions_for_topic(topic))
            if self._wanted is None or number in self._wanted
        ]

    def _first_offsets(self, partitions: Sequence[TopicPartition], start: Start) -> dict[TopicPartition, int]:
        if not partitions or start == "end":
            return dict(self._ends)
        beginnings = dict(self._consumer.beginning_offsets(partitions, timeout_ms=OFFSETS_TIMEOUT_MS))
        if start == "beginning":
            return beginnings
        start_ms = int(start.timestamp() * 1000)
        found = self._consumer.offsets_for_times(dict.fromkeys(partitions, start_ms), timeout_ms=OFFSETS_TIMEOUT_MS)
        # A partition without a record after that time is read from its end.
        return {partition: at.offset if at is not None else self._ends[partition] for partition, at in found.items()}

    def _discover(self) -> None:
        """Add partitions that have been created, and find gaps that the broker does not report."""
        if time.monotonic() < self._next_discovery_at:
            return
        with translating():
            assigned = self._consumer.assignment()
            found = self._partitions()
            added = [partition for partition in found if partition not in assigned]
            if added:
                self._consumer.assign([*assigned, *added])
                self._consumer.seek_to_beginning(*added)
            self._find_recreated(assigned)
            self._find_silence(assigned)
        self._next_discovery_at = time.monotonic() + DISCOVERY_S

    def _find_recreated(self, assigned: Collection[TopicPartition]) -> None:
        for topic in self._topics:
            known, current = self._topic_ids.get(topic), topic_id(self._consumer, topic)
            if current is None:
                continue
            self._topic_ids[topic] = current
            if known is not None and known != current:
                self._restart([partition for partition in assigned if partition.topic == topic], RECREATED)

    def _find_silence(self, assigned: Collection[TopicPartition]) -> None:
        silence_s = seconds_since_contact(self._consumer)
        if silence_s < self._longest_silence_s and self._longest_silence_s > MAX_SILENCE_S:
            self._gaps += [Gap(Partition(*partition), SILENCE) for partition in assigned]
        self._longest_silence_s = 0.0 if silence_s < self._longest_silence_s else silence_s

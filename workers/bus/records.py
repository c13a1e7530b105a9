"""Reads records as any client may have written them.

kafka-python 3.0.12 takes a header name that is not UTF-8 for a corrupt record, and after a record that it cannot read
its next poll never returns. One such message would stop every worker that meets it. Java's client, and this module,
put replacement characters into the name; what still cannot be read ends the worker with a sentence that says where.
"""

from __future__ import annotations

from typing import Any

from kafka import KafkaConsumer
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatch

from workers.errors import Misconfigured


def read_forgivingly(consumer: KafkaConsumer) -> None:
    """Have this consumer read what other clients would."""
    consumer._fetcher.PartitionRecords = _PartitionRecords


class _PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]  # kafka-python has no types
    """What was fetched of one partition."""

    def __init__(self, fetch_offset: int, partition: Any, records: Any, **settings: Any) -> None:
        super().__init__(fetch_offset, partition, _Batches(records), **settings)

    def take(self, number: int | None = None) -> Any:
        try:
            return super().take(number)
        except Exception as error:  # of decompression too, and each library has its own
            topic, partition = self.topic_partition
            self.drain()  # else the fetcher asks again and again
            raise Misconfigured(
                f"no record of {topic}-{partition} from offset {self.next_fetch_offset} on can be read: {error}; "
                "where another client can read it, this worker lacks its compression, else it is corrupt: "
                "move the group's offset behind it with kafka-consumer-groups --reset-offsets"
            ) from error


class _Batches:
    """The batches of a fetch, each made forgiving."""

    def __init__(self, records: Any) -> None:
        self._records = records

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        return _Batch(batch._buffer) if isinstance(batch, DefaultRecordBatch) else batch


class _Batch(DefaultRecordBatch):  # type: ignore[misc]
    """A batch that goes on where only a header's name is at fault."""

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except CorruptRecordError as error:
            if not isinstance(error.__context__, UnicodeDecodeError):
                raise
            # The place in the batch has not moved: this reads the same record again.
            self._buffer: bytearray = _ReplacingBuffer(self._buffer)
            return super().__next__()


class _ReplacingBuffer(bytearray):
    """Bytes of which every part decodes; in a batch, only header names are decoded."""

    def __getitem__(self, place: Any) -> Any:
        part = super().__getitem__(place)
        return _ReplacingBuffer(part) if isinstance(place, slice) else part

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, errors)

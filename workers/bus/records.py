"""Reads records as any client may have written them.

kafka-python 3.0.12 takes a header name that is not UTF-8 for a corrupt record, and after a record that it cannot read
its next poll never returns; and it unpacks a compressed batch whatever its size. One such message would stop every
worker that meets it. Here the name gets replacement characters, as in Java's client, and for a batch that is too large
once unpacked there is one empty record, which says why in a header and ends as a dead letter. What still cannot be read
ends the worker with a sentence that says where.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from typing import Any

from kafka import KafkaConsumer, codec
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch

from workers.errors import Misconfigured

#: Of a batch once unpacked. The broker limits batches as they are written, and a thousandth of this can be enough then.
MAX_UNPACKED_BYTES = 64 << 20
UNREADABLE_HEADER = "unreadable"


def read_forgivingly(consumer: KafkaConsumer) -> None:
    """Have this consumer read what other clients would."""
    consumer._fetcher.PartitionRecords = _PartitionRecords


def let_go_of_drained(consumer: KafkaConsumer) -> None:
    """Before each poll of a consumer that pauses: else records may never come.

    kafka-python 3.0.12 lays what it has read of a paused partition aside. It takes it up again only in the place of
    None, not of the emptied rest of another partition, and does not fetch that partition again either.
    """
    fetcher = consumer._fetcher
    if not fetcher._next_partition_records:
        fetcher._next_partition_records = None


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
    """A batch that goes on where only a header's name is at fault, and is not unpacked beyond measure."""

    _buffer: bytearray
    _pos: int
    _next_record_index: int
    _decompressed: bool

    def __init__(self, buffer: Any) -> None:
        super().__init__(buffer)
        self._is_too_large = False

    def _maybe_uncompress(self) -> None:
        if self._decompressed or self.compression_type not in _UNPACKERS:
            super()._maybe_uncompress()
            return
        self._assert_has_codec(self.compression_type)
        packed = io.BytesIO(memoryview(self._buffer)[self._pos :])
        with _UNPACKERS[self.compression_type](packed) as unpacking:
            self._buffer = bytearray(unpacking.read(MAX_UNPACKED_BYTES + 1))
        self._is_too_large = len(self._buffer) > MAX_UNPACKED_BYTES
        self._pos, self._decompressed = 0, True

    def __next__(self) -> Any:
        if self._is_too_large:
            return self._stand_in()
        try:
            return super().__next__()
        except CorruptRecordError as error:
            if not isinstance(error.__context__, UnicodeDecodeError):
                raise
            # The place in the batch has not moved: this reads the same record again.
            self._buffer = _ReplacingBuffer(self._buffer)
            return super().__next__()

    def _stand_in(self) -> DefaultRecord:
        """One empty record in place of all: there may be a hundred million of them."""
        if self._next_record_index > 0:
            raise StopIteration
        self._next_record_index = 1
        self._buffer = bytearray()
        reason = (
            f"a batch of {self.records_count} records from offset {self.base_offset} on "
            f"has more than {MAX_UNPACKED_BYTES} bytes once unpacked"
        )
        headers = [(UNREADABLE_HEADER, reason.encode())]
        return DefaultRecord(0, self.last_offset, self.first_timestamp, self.timestamp_type, None, b"", headers)


#: Snappy is left to kafka-python: it makes at most some twenty bytes of one.
_UNPACKERS: dict[int, Callable[[io.BytesIO], Any]] = {
    DefaultRecordBatch.CODEC_GZIP: lambda packed: gzip.GzipFile(fileobj=packed),
    DefaultRecordBatch.CODEC_LZ4: lambda packed: codec.lz4.LZ4FrameFile(packed),
    DefaultRecordBatch.CODEC_ZSTD: lambda packed: codec.zstd.ZstdDecompressor().stream_reader(
        packed, read_across_frames=True
    ),
}


class _ReplacingBuffer(bytearray):
    """Bytes of which every part decodes; in a batch, only header names are decoded."""

    def __getitem__(self, place: Any) -> Any:
        part = super().__getitem__(place)
        return _ReplacingBuffer(part) if isinstance(place, slice) else part

    def decode(self, encoding: str = "utf-8", errors: str = "replace") -> str:
        return super().decode(encoding, errors)

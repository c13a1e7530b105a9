"""Records as kafka-python hands them over, in batches that other clients or broken disks may have made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.record import MemoryRecords, MemoryRecordsBuilder

import workers.bus.records
from workers.bus.clients import to_record
from workers.bus.records import _PartitionRecords
from workers.errors import Misconfigured
from workers.ports import Partition

PARTITION = TopicPartition("in", 3)


class Raw(str):
    """A header's name as these bytes."""

    def __new__(cls, name: bytes):
        made = super().__new__(cls, name.decode("latin-1"))
        made.name = name
        return made

    def encode(self, *_) -> bytes:
        return self.name


def batch(*headers, compression: int = 0, first_offset: int = 7) -> bytearray:
    """A record for each of these headers."""
    builder = MemoryRecordsBuilder(2, compression, 1 << 20, offset=first_offset)
    for number, of_record in enumerate(headers):
        builder.append(1, b"k%d" % number, b"v%d" % number, of_record)
    builder.close()
    return bytearray(builder.buffer())


NAMES = st.binary(min_size=1, max_size=20)
HEADERS = st.lists(st.tuples(NAMES.map(Raw), st.none() | st.binary(max_size=20)), max_size=5)


@given(st.lists(HEADERS, min_size=1, max_size=5), st.sampled_from([0, 1, 3]))
def test_whatever_bytes_name_a_header_and_whatever_has_no_value_is_read(headers, compression):
    fetched = _PartitionRecords(7, PARTITION, MemoryRecords(batch(*headers, compression=compression)))
    records = [to_record(Partition(*PARTITION), record) for record in fetched.take()]

    assert [(record.offset, record.value) for record in records] == [(7 + n, b"v%d" % n) for n in range(len(headers))]
    assert [record.headers for record in records] == [
        tuple((name.name.decode("utf-8", "replace"), value or b"") for name, value in of_record)
        for of_record in headers
    ]


def test_what_comes_before_a_corrupt_batch_is_read_and_the_batch_is_named():
    whole, broken = batch([], []), batch([], [], first_offset=9)
    broken[-1] ^= 0x55  # the number of headers
    records = _PartitionRecords(7, PARTITION, MemoryRecords(bytes(whole + broken)))

    assert [record.offset for record in records.take()] == [7, 8]
    with pytest.raises(Misconfigured, match=r"no record of in-3 from offset 9 on can be read.*corrupt"):
        records.take()
    assert not records


@pytest.mark.parametrize("compression", [1, 3], ids=["gzip", "lz4"])
def test_a_batch_that_is_too_large_once_unpacked_comes_as_an_empty_record_that_says_so(monkeypatch, compression):
    monkeypatch.setattr(workers.bus.records, "MAX_UNPACKED_BYTES", 100_000)
    bomb = MemoryRecordsBuilder(2, compression, 1 << 20)
    for value in (b"v", b"x" * 200_000, b"v"):
        bomb.append(1, b"k", value, [])
    bomb.close()
    records = _PartitionRecords(0, PARTITION, MemoryRecords(bytes(bomb.buffer() + batch([], first_offset=3))))

    empty, after = (to_record(Partition(*PARTITION), record) for record in records.take())

    assert len(bomb.buffer()) < 2_000
    assert (empty.offset, empty.key, empty.value) == (2, None, b"")
    assert empty.headers == (
        ("unreadable", b"a batch of 3 records from offset 0 on has more than 100000 bytes once unpacked"),
    )
    assert (after.offset, after.value) == (3, b"v0")


def test_a_batch_in_an_unknown_compression_is_named():
    data = batch([])
    data[22] |= 5  # the attributes' low byte
    records = _PartitionRecords(7, PARTITION, MemoryRecords(bytes(data)), check_crcs=False)

    with pytest.raises(Misconfigured, match=r"from offset 7 on can be read.*compression"):
        records.take()

"""The private parts of kafka-python that are used, and records that other clients or broken disks have made."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

import kafka
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import TopicPartition
from kafka.record import MemoryRecords, MemoryRecordsBuilder

import workers.bus.kafka_internals
from workers.bus.clients import to_record
from workers.bus.kafka_internals import (
    PRIVATE_NAMES,
    UNREADABLE_HEADER,
    PollBudget,
    PollIsFull,
    _PartitionRecords,
)
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


def fetched(data: bytes, *, first_offset: int = 7, budget=None, max_batch_bytes: int = 1 << 20, **settings):
    """The records of a fetch from this offset on."""
    budget = budget or PollBudget(1 << 30, max_batch_bytes, left=1 << 30)
    return _PartitionRecords(budget, first_offset, PARTITION, MemoryRecords(data), **settings)


NAMES = st.binary(min_size=1, max_size=20)
HEADERS = st.lists(st.tuples(NAMES.map(Raw), st.none() | st.binary(max_size=20)), max_size=5)


@given(st.lists(HEADERS, min_size=1, max_size=5), st.sampled_from([0, 1, 3]))
def test_whatever_bytes_name_a_header_and_whatever_has_no_value_is_read(headers, compression):
    taken = fetched(bytes(batch(*headers, compression=compression))).take()
    records = [to_record(Partition(*PARTITION), record) for record in taken]

    assert [(record.offset, record.value) for record in records] == [(7 + n, b"v%d" % n) for n in range(len(headers))]
    assert [record.headers for record in records] == [
        tuple((name.name.decode("utf-8", "replace"), value or b"") for name, value in of_record)
        for of_record in headers
    ]


def test_one_empty_record_stands_in_for_the_rest_of_a_corrupt_batch():
    broken, whole = batch([], []), batch([], first_offset=9)
    broken[-1] ^= 0x55  # the number of headers of the second record
    records = fetched(bytes(broken + whole), check_crcs=False)

    first, stand_in, after = (to_record(Partition(*PARTITION), record) for record in records.take())

    assert (first.offset, first.value) == (7, b"v0")
    assert (stand_in.offset, stand_in.value) == (8, b"")
    ((name, reason),) = stand_in.headers
    assert name == UNREADABLE_HEADER
    assert reason.startswith(b"records of the batch at offsets 0 to 8 cannot be read: ")
    assert (after.offset, after.value) == (9, b"v0")


def test_a_batch_with_a_wrong_checksum_is_unreadable():
    data = batch([], [])
    data[-1] ^= 0x55

    (stand_in,) = fetched(bytes(data)).take()

    assert stand_in.headers == [
        (UNREADABLE_HEADER, b"records of the batch at offsets 0 to 8 cannot be read: the checksum is wrong")
    ]


@pytest.mark.parametrize("compression", [1, 3, 4], ids=["gzip", "lz4", "zstd"])
def test_a_batch_that_is_too_large_once_unpacked_is_unreadable(compression):
    bomb = MemoryRecordsBuilder(2, compression, 1 << 20)
    for value in (b"v", b"x" * 200_000, b"v"):
        bomb.append(1, b"k", value, [])
    bomb.close()
    records = fetched(bytes(bomb.buffer() + batch([], first_offset=3)), first_offset=0, max_batch_bytes=100_000)

    empty, after = (to_record(Partition(*PARTITION), record) for record in records.take())

    assert len(bomb.buffer()) < 2_000
    assert (empty.offset, empty.key, empty.value) == (2, None, b"")
    assert empty.headers == (
        (
            UNREADABLE_HEADER,
            b"records of the batch at offsets 0 to 2 cannot be read: it has more than 100000 bytes once decompressed",
        ),
    )
    assert (after.offset, after.value) == (3, b"v0")


def test_a_batch_in_an_unknown_compression_is_unreadable():
    data = batch([])
    data[22] |= 5  # the attributes' low byte

    (stand_in,) = fetched(bytes(data), check_crcs=False).take()

    assert b"compression" in stand_in.headers[0][1]


def test_a_poll_stops_at_its_budget_and_the_next_one_continues():
    budget = PollBudget(max_bytes=10, max_batch_bytes=1 << 20, left=10)
    records = fetched(bytes(batch(*[[]] * 10)), budget=budget)

    first = records.take()
    with pytest.raises(PollIsFull):
        records.take()
    budget.left = 1 << 20
    rest = records.take()

    assert 0 < len(first) < 10
    assert [record.offset for record in first + rest] == list(range(7, 17))


def test_no_private_name_has_been_moved_by_kafka_python():
    for path, names in PRIVATE_NAMES.items():
        owner = find(path)
        defined = names_of(owner)
        for name in names:
            assert name in defined, (
                f"kafka-python {kafka.__version__} has moved {path}.{name}; workers/bus/kafka_internals.py says "
                "what it is for"
            )


def find(path: str):
    """The class at a dotted path: modules, then classes."""
    parts = path.split(".")
    for number in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ModuleNotFoundError:
            continue
        for part in parts[number:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"kafka-python has moved {path}")


def names_of(owner: type) -> set[str]:
    """The attributes of a class and those that its methods set on themselves, inherited ones included."""
    names = set(dir(owner))
    for each in owner.__mro__[:-1]:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(each)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def test_private_names_are_used_nowhere_else():
    used = []
    for path in sorted(Path(workers.bus.__file__).parent.glob("*.py")):
        if path.name == "kafka_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
                used.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")

    assert used == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(owner: ast.expr) -> bool:
    """Whether an attribute's owner is an object of this package, or a class as an underscore name."""
    return isinstance(owner, ast.Name) and (owner.id in ("self", "cls") or owner.id.startswith("_"))


def test_every_private_name_that_is_used_is_listed():
    listed = {name for names in PRIVATE_NAMES.values() for name in names}
    source = Path(workers.bus.kafka_internals.__file__).read_text()

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            assert node.attr in listed, ast.unparse(node)

"""Partitions are opened after their start is committed, and the counts of starts name the message that kills."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.bus.memory import MemoryBroker, MemoryInbox
from workers.partitions import MAX_FAILED_STARTS, MAX_SUSPECTS, Marker, Partitions, first_offset
from workers.ports import Assignment, Commit, Outgoing, Partition, Record

P = Partition("in", 0)


def assignment(committed: Commit | None, *, beginning: int = 0, end: int = 100, topic_id: str = "t1") -> Assignment:
    return Assignment(P, committed, beginning, end, topic_id)


def committed(offset: int, topic_id: str = "t1") -> Commit:
    return Commit(offset, str(Marker(1, 0, topic_id)))


@pytest.mark.parametrize(
    ("given_assignment", "offset"),
    [
        (assignment(None, beginning=3), 3),
        (assignment(committed(7)), 7),
        (assignment(committed(7), beginning=9), 9),  # retention
        (assignment(committed(700)), 100),  # the broker has lost records
        (assignment(Commit(700, "by another client")), 0),  # the topic may be another one
        (assignment(committed(7, topic_id="t0")), 0),  # created again
        (assignment(committed(7, topic_id="t0"), topic_id=""), 7),  # the broker reports no ids
        (assignment(Commit(7)), 7),
    ],
)
def test_work_begins_at_the_committed_offset_unless_the_partition_has_changed(given_assignment, offset):
    assert first_offset(given_assignment) == offset


@given(st.integers(0, 10**8), st.integers(0, 10**8), st.from_regex(r"[0-9a-zA-Z_-]{0,36}", fullmatch=True))
def test_a_marker_is_read_as_it_was_written(starts, alone, topic_id):
    assert Marker.parse(str(Marker(starts, alone, topic_id))) == Marker(starts, alone, topic_id)


@given(st.text())
def test_metadata_of_other_programs_count_as_none(metadata):
    assert Marker.parse(metadata) == Marker() or metadata.startswith("edje starts=")


class Bench:
    """A worker's partitions over a twin with one partition."""

    def __init__(self, found: Marker | None = None, *, offset: int = 0, num_records: int = 10) -> None:
        self.broker = MemoryBroker()
        for number in range(num_records):
            self.broker.append(Outgoing("in", None, b"%d" % number))
        if found is not None:
            self.broker.committed["g", P] = Commit(offset, str(found))
        self.inbox = MemoryInbox(self.broker, topic="in", group_id="g")
        self.partitions = Partitions(self.inbox, lambda: None)

    @property
    def marker(self) -> Marker:
        return Marker.parse(self.broker.committed["g", P].metadata)

    def take(self) -> Record:
        record = self.inbox.take()
        assert record is not None
        return record


def test_nothing_is_read_before_the_start_is_committed():
    bench = Bench()
    bench.broker.away = True
    bench.partitions.turn(0.0)
    assert bench.inbox.take() is None
    assert bench.partitions.wants_turn_in_s(0.0) is not None

    bench.broker.away = False
    bench.partitions.turn(100.0)

    assert bench.take().offset == 0
    assert bench.marker == Marker(1, 0, "in")


def test_each_start_at_the_same_offset_is_counted_and_progress_resets_the_count():
    bench = Bench(Marker(1, 0, "in"), offset=2)
    bench.partitions.turn(0.0)
    assert bench.marker.starts == 2

    assert bench.partitions.commits({P: 3}) == {P: Commit(3, str(Marker(1, 0, "in")))}


def test_before_two_failed_starts_nothing_is_suspect():
    bench = Bench(Marker(MAX_FAILED_STARTS - 1, 0, "in"))
    bench.partitions.turn(0.0)

    assert not bench.partitions.are_suspect()
    assert bench.partitions.verdict(bench.take()) == "free"


def test_after_two_failed_starts_the_next_messages_are_suspect_and_later_ones_are_not():
    bench = Bench(Marker(MAX_FAILED_STARTS, 0, "in"), num_records=3)
    bench.partitions.turn(0.0)
    bench.broker.append(Outgoing("in", None, b"later"))

    assert bench.partitions.are_suspect()
    assert [bench.partitions.verdict(bench.take()) for _ in range(4)] == ["suspect"] * 3 + ["free"]
    assert not bench.partitions.are_suspect()


def test_only_as_many_messages_are_suspect_as_can_have_been_in_work():
    bench = Bench(Marker(MAX_FAILED_STARTS, 0, "in"), num_records=MAX_SUSPECTS + 10)
    bench.partitions.turn(0.0)

    verdicts = [bench.partitions.verdict(bench.take()) for _ in range(MAX_SUSPECTS + 10)]

    assert verdicts == ["suspect"] * MAX_SUSPECTS + ["free"] * 10


def test_a_partition_without_messages_is_not_suspect_however_often_its_owners_died():
    bench = Bench(Marker(9, 0, "in"), offset=10)
    bench.partitions.turn(0.0)

    assert not bench.partitions.are_suspect()


def test_suspicion_ends_when_the_partition_has_no_more_messages():
    bench = Bench(Marker(MAX_FAILED_STARTS, 0, "in"), num_records=2)
    bench.partitions.turn(0.0)
    for _ in range(2):
        bench.take()

    bench.partitions.clear_exhausted()

    assert not bench.partitions.are_suspect()


def test_a_message_that_was_alone_when_the_process_died_is_the_culprit():
    bench = Bench(Marker(MAX_FAILED_STARTS, 0, "in"))
    bench.partitions.turn(0.0)
    bench.take()
    second = bench.take()
    bench.partitions.mark_alone(second).result()

    successor = Partitions(MemoryInbox(bench.broker, topic="in", group_id="g"), lambda: None)
    bench.partitions, bench.inbox = successor, successor._inbox
    bench.partitions.turn(0.0)
    record = bench.take()

    assert record.offset == second.offset
    assert bench.partitions.verdict(record) == "culprit"
    assert bench.partitions.num_deaths_alone(record) == 1
    assert bench.partitions.verdict(bench.take()) == "suspect"


def test_an_orderly_end_restores_the_counts_that_were_found():
    bench = Bench(Marker(MAX_FAILED_STARTS, 1, "in"), offset=4)
    bench.partitions.turn(0.0)
    assert bench.marker == Marker(MAX_FAILED_STARTS + 1, 1, "in")
    bench.partitions.mark_alone(bench.take()).result()
    assert bench.marker.alone == 2

    bench.partitions.leave().result()

    assert bench.broker.committed["g", P] == Commit(4, str(Marker(MAX_FAILED_STARTS, 1, "in")))


def test_an_orderly_end_after_progress_leaves_no_counts():
    bench = Bench(Marker(MAX_FAILED_STARTS, 0, "in"))
    bench.partitions.turn(0.0)
    bench.partitions.committed({P: 5})

    bench.partitions.leave([P]).result()

    assert bench.broker.committed["g", P] == Commit(5, str(Marker(0, 0, "in")))


def test_a_partition_that_was_given_back_meanwhile_is_not_opened():
    bench = Bench()
    bench.broker.away = True
    bench.partitions.turn(0.0)
    bench.inbox.lose([0])
    bench.partitions.drop([P])
    bench.broker.away = False

    bench.partitions.turn(100.0)

    assert bench.inbox.take() is None
    assert bench.broker.committed == {}

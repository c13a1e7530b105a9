"""The loop with the twins: it takes, delivers, gives partitions back, and drains."""

from __future__ import annotations

from collections import deque
from unittest.mock import Mock

import pytest

from workers.bus.memory import MemoryBroker, MemoryInbox, MemoryOutbox
from workers.delivery import AtLeastOnce
from workers.errors import Poison
from workers.loop import MAX_RECORDS_PER_TURN, MAX_WAIT_S, Loop, Wake
from workers.ports import Finished, Outgoing, Partition, Record
from workers.telemetry.bus_spans import BusSpans

P0, P1 = Partition("in", 0), Partition("in", 1)


class EchoJob:
    """Answers each record with its own value, when the test says so; raises at the values in `breaks_at`."""

    def __init__(self) -> None:
        self.room = 1000
        self.breaks_at: set[bytes] = set()
        self.can_refuse = True
        self.refused: list[Finished] = []
        self.held = False
        self.active: deque[Record] = deque()

    def has_room(self) -> bool:
        return len(self.active) < self.room

    def accept(self, record: Record, now: float) -> None:
        self.active.append(record)
        if record.value in self.breaks_at:
            raise ZeroDivisionError

    def refuse(self, record: Record, error: Poison, now: float) -> None:
        self.active.remove(record)
        if not self.can_refuse:
            raise RuntimeError("no outcome can be written")
        self.refused.append(Finished(record, (Outgoing("out", record.key, error.code.encode()),)))

    def turn(self, now: float) -> list[Finished]:
        done = [] if self.held else list(self.active)
        for record in done:
            self.active.remove(record)
        refused, self.refused = self.refused, []
        return refused + [Finished(record, (Outgoing("out", record.key, record.value),)) for record in done]

    def wants_turn_in_s(self, now: float) -> float | None:
        return None

    def drop(self, partitions) -> None:
        self.active = deque(record for record in self.active if record.partition not in partitions)

    def num_active(self) -> int:
        return len(self.active)


class Bench:
    def __init__(self) -> None:
        self.now = 100.0
        self.broker = MemoryBroker(num_partitions=2)
        self.wake = Wake()
        self.inbox = MemoryInbox(self.broker, topic="in", group_id="g", wake=self.wake)
        self.job = EchoJob()
        self.turns: list[float] = []
        self.loop = Loop(
            inbox=self.inbox,
            job=self.job,
            delivery=AtLeastOnce(self.inbox, MemoryOutbox(self.broker), self.wake, 1.0, Mock(), BusSpans.off()),
            dead_letter=self.dead_letter,
            wake=self.wake,
            clock=lambda: self.now,
            drain_grace_s=10.0,
            revoke_grace_s=5.0,
            on_turn=self.turns.append,
        )

    def dead_letter(self, record: Record, error: Poison) -> Finished:
        return Finished(record, (Outgoing("in.dlq", record.key, record.value, (("code", error.code.encode()),)),))

    def publish(self, number: int, partition: Partition = P0) -> None:
        log = self.broker.partition_log(*partition)
        for _ in range(number):
            log.append(Record(partition, len(log), b"k", b"%d" % len(log), (), 0))

    @property
    def answered(self) -> int:
        return len(self.broker.log("out"))

    @property
    def committed(self) -> dict[Partition, int]:
        return {partition: offset for (_, partition), offset in self.broker.committed.items()}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_is_taken_is_answered_and_committed(bench):
    bench.publish(3)

    assert bench.loop.turn()
    assert bench.loop.turn()

    assert bench.answered == 3
    assert bench.committed == {P0: 3}
    assert bench.turns == [100.0, 100.0]


def test_a_burst_is_taken_in_turns(bench):
    bench.publish(MAX_RECORDS_PER_TURN + 5)

    bench.loop.turn()
    assert bench.answered == MAX_RECORDS_PER_TURN
    bench.loop.turn()

    assert bench.answered == MAX_RECORDS_PER_TURN + 5


def test_a_job_without_room_holds_the_bus_back(bench):
    bench.publish(5)
    bench.job.room, bench.job.held = 2, True

    bench.loop.turn()
    bench.loop.turn()

    assert bench.job.num_active() == 2
    assert bench.inbox.lag() == {P0: 3, P1: 0}


def test_a_revoked_partition_is_released_when_its_messages_are_committed(bench):
    bench.publish(2)
    bench.publish(1, P1)
    bench.job.held = True
    bench.loop.turn()
    released = lose(bench, 0)

    bench.loop.turn()
    assert released == []
    bench.job.held = False
    bench.loop.turn()
    bench.loop.turn()

    assert released == [True]
    assert bench.committed[P0] == 2


def test_an_idle_revoked_partition_is_released_at_once(bench):
    bench.loop.turn()
    released = lose(bench, 0)

    bench.loop.turn()

    assert released == [True]


def test_what_is_not_finished_in_time_is_dropped_and_released(bench):
    bench.publish(2)
    bench.publish(1, P1)
    bench.job.held = True
    bench.loop.turn()
    released = lose(bench, 0)
    bench.loop.turn()

    bench.now += 5.0
    bench.loop.turn()

    assert released == [True]
    assert [record.partition for record in bench.job.active] == [P1]
    assert bench.committed == {}


def test_a_lost_partition_is_dropped_at_once_and_can_come_back(bench):
    bench.publish(2)
    bench.job.held = True
    bench.loop.turn()
    released = lose(bench, 0, lost=True)

    bench.loop.turn()
    assert released == [True]
    assert bench.job.num_active() == 0
    bench.inbox.gain([0])
    bench.job.held = False
    bench.loop.turn()
    bench.loop.turn()

    assert bench.answered == 2
    assert bench.committed == {P0: 2}


def test_a_stop_takes_nothing_more_and_ends_when_all_is_delivered(bench):
    bench.publish(1)
    bench.job.held = True
    bench.loop.turn()
    bench.publish(1)

    bench.loop.stop()
    assert bench.loop.turn()
    bench.job.held = False
    while bench.loop.turn():
        assert len(bench.turns) < 10

    assert bench.answered == 1
    assert bench.committed == {P0: 1}


def test_a_stop_commits_without_waiting_for_the_interval(bench):
    bench.publish(1)
    bench.loop.turn()
    bench.publish(1)
    bench.loop.turn()

    bench.loop.stop()
    while bench.loop.turn():
        assert len(bench.turns) < 10

    assert bench.committed == {P0: 2}


def test_a_drain_keeps_the_inbox_as_it_is_and_commits(bench):
    bench.publish(1)
    bench.job.held = True
    bench.loop.turn()

    bench.loop.stop()
    bench.loop.turn()
    bench.publish(1)
    assert bench.inbox.take() is None
    bench.job.held = False
    while bench.loop.turn():
        assert len(bench.turns) < 10

    assert bench.committed == {P0: 1}


def test_a_drain_ends_with_the_grace_period(bench):
    bench.publish(1)
    bench.job.held = True
    bench.loop.turn()
    bench.loop.stop()

    assert bench.loop.turn()
    bench.now += 10.0

    assert not bench.loop.turn()
    assert bench.committed == {}


def test_an_unexpected_error_of_one_message_becomes_its_outcome_and_the_work_goes_on(bench):
    bench.publish(3)
    bench.job.breaks_at = {b"1"}

    bench.loop.turn()
    bench.loop.turn()

    assert sorted(record.value for record in bench.broker.log("out")) == [b"0", b"2", b"internal_error"]
    assert bench.committed == {P0: 3}


def test_a_message_whose_outcome_cannot_be_written_still_goes_to_the_dead_letters(bench):
    bench.publish(2)
    bench.job.breaks_at, bench.job.can_refuse = {b"0"}, False

    bench.loop.turn()
    bench.loop.turn()

    (letter,) = bench.broker.log("in.dlq")
    assert (letter.value, letter.headers) == (b"0", (("code", b"internal_error"),))


def test_an_error_of_the_job_ends_the_loop(bench):
    def fail(now):
        raise RuntimeError("the device is gone")

    bench.job.turn = fail

    with pytest.raises(RuntimeError, match="the device is gone"):
        bench.loop.run()


def test_a_running_loop_ends_by_itself_once_stopped(bench):
    bench.publish(3)
    bench.loop.stop()

    bench.loop.run()

    assert bench.answered == 0


def test_the_loop_turns_often_enough_to_be_seen_alive(bench):
    assert bench.loop._wait_s(bench.now) == MAX_WAIT_S


def test_a_wake_before_the_wait_is_not_lost():
    wake = Wake()
    wake()

    wake.wait(60.0)  # returns at once


def lose(bench: Bench, number: int, *, lost: bool = False) -> list[bool]:
    """Have a partition revoked; the list is no longer empty once the loop has released it."""
    released: list[bool] = []
    bench.inbox.lose([number], lost=lost)
    (revocation,) = bench.inbox.revocations()
    told = type(revocation)(revocation.partitions, revocation.lost, lambda: released.append(True))
    bench.inbox._revocations.append(told)
    return released

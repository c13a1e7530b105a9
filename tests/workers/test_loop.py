"""The loop with the twins: it takes, delivers, gives partitions back, and drains."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from unittest.mock import Mock

import pytest

from delivery_harness import committed_in
from workers.at_least_once import AtLeastOnce
from workers.bus.memory import MemoryBroker, MemoryInbox, MemoryOutbox
from workers.delivery import UndeliveredLimits
from workers.errors import Poison
from workers.loop import LEAVE_S, MAX_ACCEPT_S, MAX_RECORDS_PER_TURN, MAX_WAIT_S, Loop, Wake
from workers.partitions import MAX_FAILED_STARTS, Marker, Partitions
from workers.ports import Commit, Finished, Outgoing, Partition, Record
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
    def __init__(self, broker: MemoryBroker | None = None) -> None:
        self.now = 100.0
        self.broker = broker or MemoryBroker(num_partitions=2)
        self.wake = Wake()
        self.inbox = MemoryInbox(self.broker, topic="in", group_id="g", wake=self.wake)
        self.job = EchoJob()
        self.turns: list[float] = []
        self.partitions = Partitions(self.inbox, self.wake)
        self.loop = Loop(
            inbox=self.inbox,
            job=self.job,
            delivery=AtLeastOnce(
                self.inbox,
                MemoryOutbox(self.broker),
                self.partitions,
                self.wake,
                1.0,
                Mock(),
                BusSpans.off(),
                UndeliveredLimits(),
            ),
            partitions=self.partitions,
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
            log.append(Record(partition, len(log), None, b"%d" % len(log), (), 0))

    @property
    def answered(self) -> int:
        return len(self.broker.log("out"))

    @property
    def committed(self) -> dict[Partition, int]:
        return committed_in(self.broker)

    def turn(self, number: int = 1) -> None:
        for _ in range(number):
            self.loop.turn()


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


def test_a_burst_of_records_that_take_long_to_accept_is_taken_in_turns(bench, monkeypatch):
    bench.publish(10)
    accept = bench.job.accept

    def slow(record: Record, now: float) -> None:
        bench.now += MAX_ACCEPT_S / 2
        accept(record, now)

    monkeypatch.setattr(bench.job, "accept", slow)
    bench.loop.turn()
    assert bench.answered == 2
    for _ in range(4):
        bench.loop.turn()

    assert bench.answered == 10


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


def test_too_many_undelivered_outcomes_pause_reading(bench):
    bench.loop._delivery._undelivered._limits = UndeliveredLimits(max_messages=2)
    bench.broker.away = True
    bench.publish(1)
    bench.turn()
    assert bench.answered == 0  # not before the start of work is committed
    bench.broker.away = False
    bench.now += 10.0
    bench.turn()
    bench.broker.away = True

    for _ in range(5):
        bench.publish(1)
        bench.turn()

    assert bench.inbox.lag()[P0] == 3
    bench.broker.away = False
    for _ in range(5):
        bench.now += 10.0
        bench.turn()
    assert bench.answered == 6


def test_an_orderly_end_leaves_no_mark_of_a_start(bench):
    bench.publish(2)
    bench.turn(2)
    assert Marker.parse(bench.broker.committed["g", P0].metadata).starts == 1

    bench.loop.stop()
    bench.turn(3)

    assert {Marker.parse(commit.metadata).starts for commit in bench.broker.committed.values()} == {0}


def test_a_revoked_partition_is_left_without_a_mark_before_it_is_released(bench):
    bench.publish(1)
    bench.turn(2)
    released = lose(bench, 0)

    bench.turn()

    assert released == [True]
    assert bench.broker.committed["g", P0] == Commit(1, str(Marker(0, 0, "in")))


def test_a_drain_whose_grace_is_over_is_not_counted_as_a_death(bench):
    bench.publish(1)
    bench.job.held = True
    bench.turn()
    bench.loop.stop()
    bench.turn()
    bench.now += 10.0
    bench.turn()

    assert bench.broker.committed["g", P0] == Commit(0, str(Marker(0, 0, "in")))


@pytest.mark.parametrize("stops", [False, True])
def test_nothing_is_delivered_any_more_once_the_orderly_end_is_being_committed(bench, stops):
    bench.publish(1)
    bench.job.held = True
    bench.turn()
    bench.inbox.commit = Mock(return_value=Future())
    if stops:
        bench.loop.stop()
    else:
        lose(bench, 0)
    bench.turn()
    bench.now += 10.0 if stops else 5.0
    bench.turn()

    bench.job.held = False
    bench.turn(3)

    assert bench.inbox.commit.called
    assert bench.answered == 0  # a transaction that commits now could be overwritten by the earlier offset


def test_a_worker_does_not_wait_for_ever_to_report_its_orderly_end(bench):
    bench.publish(1)
    bench.job.held = True
    bench.turn()
    bench.loop.stop()
    bench.turn()
    bench.broker.away = True
    bench.now += 10.0
    bench.turn()

    bench.now += LEAVE_S

    assert not bench.loop.turn()


class Crash(BaseException):
    """The end of the process."""


def lives_until_served(broker: MemoryBroker, killers: set[bytes], kills_at: str = "accept") -> int:
    """Run workers one after the other, each until it crashes or has served everything; returns how many it took."""
    for life in range(1, 30):
        bench = Bench(broker)
        accept, refuse, turn = bench.job.accept, bench.job.refuse, bench.job.turn

        def dying_accept(record, now, accept=accept):
            if record.value in killers:
                raise Crash
            accept(record, now)

        def dying_refuse(record, error, now, refuse=refuse, bench=bench):
            if kills_at == "refuse":
                raise Crash
            bench.job.active.append(record)
            refuse(record, error, now)

        bench.job.accept, bench.job.refuse = dying_accept, dying_refuse
        bench.job.turn = turn
        try:
            for _ in range(400):
                bench.now += 0.5
                bench.turn()
                if sum(bench.inbox.lag().values()) == 0 and bench.loop._delivery.settled() and not bench.loop._alone:
                    return life
        except Crash:
            continue
        raise AssertionError("nothing goes on")
    raise AssertionError("the workers die for ever")


def test_the_message_under_which_the_process_dies_is_found_and_the_others_are_served():
    broker = MemoryBroker(num_partitions=2)
    Bench(broker).publish(20)

    lives = lives_until_served(broker, {b"13"})

    assert lives == MAX_FAILED_STARTS + 2  # one that dies with the message alone, and one that knows it
    answers = [record.value for record in broker.log("out")]
    assert set(answers) == {b"%d" % number for number in range(20) if number != 13} | {b"worker_died"}
    assert answers.count(b"worker_died") == 1


def test_a_first_message_that_kills_is_found_too():
    broker = MemoryBroker(num_partitions=2)
    Bench(broker).publish(1)

    assert lives_until_served(broker, {b"0"}) == MAX_FAILED_STARTS + 2
    assert [record.value for record in broker.log("out")] == [b"worker_died"]


def test_several_messages_that_kill_are_found_one_after_the_other():
    broker = MemoryBroker(num_partitions=2)
    bench = Bench(broker)
    bench.publish(10)
    bench.publish(10, P1)

    lives = lives_until_served(broker, {b"2", b"3", b"9"})

    assert lives <= 2 * MAX_FAILED_STARTS + 10
    answers = [record.value for record in broker.log("out")]
    assert answers.count(b"worker_died") == 6
    assert set(answers) == {b"%d" % number for number in range(10)} - {b"2", b"3", b"9"} | {b"worker_died"}


def test_a_message_that_kills_even_when_it_is_refused_goes_to_the_dead_letters_without_the_job():
    broker = MemoryBroker(num_partitions=2)
    Bench(broker).publish(3)

    lives_until_served(broker, {b"1"}, kills_at="refuse")

    (letter,) = broker.log("in.dlq")
    assert (letter.value, letter.headers) == (b"1", (("code", b"worker_died"),))
    assert {record.value for record in broker.log("out")} == {b"0", b"2"}


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
    watched = type(revocation)(revocation.partitions, revocation.lost, lambda: released.append(True))
    bench.inbox._revocations.append(watched)
    return released

"""The two promises: nothing is committed before its messages are in the broker, or both are one transaction."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Executor, Future
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.bus.memory import MemoryBroker, MemoryInbox, MemoryTransactionalOutbox
from workers.delivery import RETRY_CAP_S, AtLeastOnce, ExactlyOnce, retry_pause_s
from workers.errors import Misconfigured, TooLarge, TopicRefused, Transient
from workers.ports import Finished, Outgoing, Partition, Record
from workers.telemetry.bus_spans import BusSpans

A, B = Partition("in", 0), Partition("in", 1)
LATER = 1000.0  # past every retry


def record(offset: int, partition: Partition = A) -> Record:
    return Record(partition, offset, b"k", b"v", (), 0)


def reply(value: bytes = b"reply", fallback: bytes | None = b"too large") -> Outgoing:
    message = Outgoing("out", b"k", value)
    if fallback is None:
        return message
    return replace(message, if_refused=lambda refused: Outgoing("out", b"k", fallback))


class Counted(Counter):
    """What the delivery says it did."""

    def __init__(self) -> None:
        super().__init__()
        self.published: list[tuple[float, object]] = []  # seconds, and the span of the record

    def count_commit(self) -> None:
        self["commit"] += 1

    def count_retry(self, kind: str) -> None:
        self[f"retry {kind}"] += 1

    def observe_publish(self, seconds: float, span: object) -> None:
        self.published.append((seconds, span))


class HeldOutbox:
    """Acknowledges when the test says so."""

    def __init__(self) -> None:
        self.sent: list[tuple[Outgoing, Future[None]]] = []

    def send(self, message: Outgoing) -> Future[None]:
        self.sent.append((message, Future()))
        return self.sent[-1][1]

    def close(self, timeout_s: float) -> None:
        """Nothing is held open."""

    def settle(self, number: int, error: Exception | None = None) -> None:
        future = self.sent[number][1]
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class HeldExecutor(Executor):
    """Runs what was submitted when the test says so."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Future, object]] = []

    def submit(self, call, /, *args, **kwargs) -> Future:
        future: Future = Future()
        self.submitted.append((future, lambda: call(*args, **kwargs)))
        return future

    def run(self) -> None:
        future, call = self.submitted.pop(0)
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)


class AtLeastOnceBench:
    def __init__(self, *, interval_s: float = 0.0, spans: BusSpans | None = None) -> None:
        self.broker = MemoryBroker(num_partitions=2)
        self.inbox = MemoryInbox(self.broker, topic="in", group_id="g")
        self.outbox = HeldOutbox()
        self.wakes = 0
        self.counts = Counted()
        self.delivery = AtLeastOnce(
            self.inbox, self.outbox, self.wake, interval_s, self.counts, spans or BusSpans.off()
        )

    def wake(self) -> None:
        self.wakes += 1

    def finish(self, offset: int, *messages: Outgoing, partition: Partition = A) -> None:
        self.delivery.finish(Finished(record(offset, partition), messages), 0.0)

    def turn(self, now: float = 0.0) -> None:
        self.delivery.turn(now)  # sees acknowledgements and commits
        self.delivery.turn(now)  # sees that the commit is through

    @property
    def committed(self) -> dict[Partition, int]:
        return {partition: offset for (_, partition), offset in self.broker.committed.items()}


def test_an_offset_is_committed_only_after_its_message_is_acknowledged():
    bench = AtLeastOnceBench()
    bench.delivery.begin(record(0))
    bench.finish(0, reply(), reply())

    bench.outbox.settle(0)
    bench.turn()
    assert bench.committed == {}
    bench.outbox.settle(1)
    assert not bench.delivery.settled()
    bench.turn()

    assert bench.committed == {A: 1}
    assert bench.delivery.settled()
    assert bench.wakes >= 3


def test_a_later_message_does_not_carry_an_earlier_one_along():
    bench = AtLeastOnceBench()
    for offset in (0, 1):
        bench.delivery.begin(record(offset))
    bench.finish(1, reply())
    bench.outbox.settle(0)

    bench.turn()

    assert bench.committed == {}
    assert not bench.delivery.settled([A])
    assert bench.delivery.settled([B])


def test_a_record_without_messages_is_committed():
    bench = AtLeastOnceBench()
    bench.delivery.begin(record(4))
    bench.finish(4)

    bench.turn()

    assert bench.committed == {A: 5}


def test_a_transient_failure_is_sent_again_after_a_pause():
    bench = AtLeastOnceBench()
    bench.delivery.begin(record(0))
    bench.finish(0, reply())
    bench.outbox.settle(0, Transient("away"))

    bench.turn(now=10.0)
    assert 0 <= bench.delivery.wants_turn_in_s(10.0) <= RETRY_CAP_S
    bench.turn(now=LATER)
    assert [message.value for message, _ in bench.outbox.sent] == [b"reply", b"reply"]
    bench.outbox.settle(1)
    bench.turn(now=LATER)

    assert bench.committed == {A: 1}
    assert bench.delivery.wants_turn_in_s(LATER) is None
    assert bench.counts == {"retry publish": 1, "commit": 1}


@pytest.mark.parametrize("refused", [TooLarge("no"), TopicRefused("no")])
def test_a_message_that_is_refused_is_replaced(refused):
    bench = AtLeastOnceBench()
    bench.delivery.begin(record(0))
    bench.finish(0, reply())
    bench.outbox.settle(0, refused)

    bench.turn()
    bench.outbox.settle(1)
    bench.turn()

    assert [message.value for message, _ in bench.outbox.sent] == [b"reply", b"too large"]
    assert bench.committed == {A: 1}


@pytest.mark.parametrize(
    ("error", "fallback", "ends_in"),
    [
        (TooLarge("no"), None, Misconfigured),
        (TopicRefused("no"), None, Misconfigured),
        (Misconfigured("not allowed"), b"small", Misconfigured),
        (ZeroDivisionError(), b"small", ZeroDivisionError),
    ],
)
def test_what_has_no_remedy_ends_the_worker(error, fallback, ends_in):
    bench = AtLeastOnceBench()
    bench.delivery.begin(record(0))
    bench.finish(0, reply(fallback=fallback))
    bench.outbox.settle(0, error)

    with pytest.raises(ends_in):
        bench.turn()


def test_commits_wait_for_their_interval_unless_in_a_hurry():
    bench = AtLeastOnceBench(interval_s=1.0)
    for offset in range(3):
        bench.delivery.begin(record(offset))
    bench.finish(0)
    bench.turn(now=10.0)
    bench.finish(1)
    bench.turn(now=10.4)

    assert bench.committed == {A: 1}
    assert bench.delivery.wants_turn_in_s(10.4) == pytest.approx(0.6)
    bench.turn(now=11.0)
    assert bench.committed == {A: 2}
    bench.finish(2)
    bench.delivery.hurry()
    bench.turn(now=11.1)
    assert bench.committed == {A: 3}


def test_a_commit_that_failed_is_made_again():
    bench = AtLeastOnceBench()
    bench.delivery.begin(record(0))
    bench.finish(0)
    bench.broker.away = True
    bench.turn(now=10.0)
    assert not bench.delivery.settled()

    bench.broker.away = False
    bench.turn(now=11.0)

    assert bench.committed == {A: 1}
    assert bench.delivery.settled()
    assert bench.counts == {"retry commit": 1, "commit": 1}


def test_what_was_dropped_is_neither_sent_again_nor_committed():
    bench = AtLeastOnceBench()
    for partition in (A, B):
        bench.delivery.begin(record(0, partition))
        bench.finish(0, reply(), partition=partition)
    bench.outbox.settle(0, Transient("away"))
    bench.turn(now=10.0)

    bench.delivery.drop([A])
    bench.outbox.settle(1)
    bench.turn(now=LATER)

    assert len(bench.outbox.sent) == 2
    assert bench.committed == {B: 1}
    assert bench.delivery.settled()


def test_what_fails_after_it_was_dropped_is_not_sent_again():
    bench = AtLeastOnceBench()
    bench.delivery.begin(record(0, A))
    bench.finish(0, reply(), partition=A)

    bench.delivery.drop([A])
    bench.outbox.settle(0, Transient("away"))
    bench.turn(now=10.0)
    bench.turn(now=LATER)

    assert len(bench.outbox.sent) == 1


@given(st.permutations(range(6)), st.lists(st.booleans(), min_size=6, max_size=6))
def test_in_whatever_order_acknowledgements_come_no_unacknowledged_message_is_committed(order, fails_first):
    bench = AtLeastOnceBench()
    for offset in range(6):
        bench.delivery.begin(record(offset))
        bench.finish(offset, replace(reply(), value=b"%d" % offset))
    acknowledged = set()
    for now, number in enumerate(order):
        if fails_first[number]:
            bench.outbox.settle(number, Transient("away"))
            bench.turn(now=now * LATER)
            bench.turn(now=(now + 0.5) * LATER)
            number = len(bench.outbox.sent) - 1
        bench.outbox.settle(number)
        acknowledged.add(int(bench.outbox.sent[number][0].value))
        bench.turn(now=(now + 0.6) * LATER)
        assert set(range(bench.committed.get(A, 0))) <= acknowledged

    assert bench.committed == {A: 6}


@given(st.integers(1, 1000))
def test_the_pause_before_a_retry_has_a_ceiling(attempt):
    assert 0 <= retry_pause_s(attempt) <= RETRY_CAP_S


class ExactlyOnceBench:
    def __init__(
        self, *, interval_s: float = 0.0, max_message_bytes: int = 1000, spans: BusSpans | None = None
    ) -> None:
        self.broker = MemoryBroker(num_partitions=2, max_message_bytes=max_message_bytes)
        self.executor = HeldExecutor()
        self.outbox = MemoryTransactionalOutbox(self.broker, group_id="g")
        self.counts = Counted()
        self.delivery = ExactlyOnce(
            self.outbox, self.executor, lambda: None, interval_s, self.counts, spans or BusSpans.off()
        )

    def begin(self, *offsets: int, partition: Partition = A) -> None:
        for offset in offsets:
            self.delivery.begin(record(offset, partition))

    def finish(self, offset: int, *values: bytes, partition: Partition = A) -> None:
        self.finish_with(offset, *(reply(value) for value in values), partition=partition)

    def finish_with(self, offset: int, *messages: Outgoing, partition: Partition = A) -> None:
        self.delivery.finish(Finished(record(offset, partition), messages), 0.0)

    def transact(self, now: float = 0.0) -> None:
        self.delivery.turn(now)
        self.executor.run()
        self.delivery.turn(now)

    @property
    def published(self) -> list[bytes]:
        return sorted(record.value for record in self.broker.log("out"))

    @property
    def committed(self) -> dict[Partition, int]:
        return {partition: offset for (_, partition), offset in self.broker.committed.items()}


def test_a_run_of_finished_records_is_one_transaction():
    bench = ExactlyOnceBench()
    bench.begin(0, 1, 2, 3)
    for offset in (0, 1, 3):
        bench.finish(offset, b"%d" % offset)

    bench.transact()

    assert bench.published == [b"0", b"1"]
    assert bench.committed == {A: 2}
    assert not bench.delivery.settled([A])


def test_a_finished_record_waits_for_the_one_before_it():
    bench = ExactlyOnceBench(interval_s=0.05)
    bench.begin(0, 1)
    bench.finish(1, b"1")

    bench.delivery.turn(10.0)
    assert bench.executor.submitted == []
    assert bench.delivery.wants_turn_in_s(10.0) == 0.05
    bench.finish(0, b"0")
    bench.transact(10.1)

    assert bench.committed == {A: 2}
    assert bench.delivery.settled()


def test_only_one_transaction_is_in_flight():
    bench = ExactlyOnceBench()
    bench.begin(0, 1)
    bench.finish(0, b"0")
    bench.delivery.turn(0.0)
    bench.finish(1, b"1")
    bench.delivery.turn(1.0)

    assert len(bench.executor.submitted) == 1
    assert bench.delivery.wants_turn_in_s(1.0) is None
    assert not bench.delivery.settled()


def test_a_transaction_that_failed_is_repeated_as_it_was():
    bench = ExactlyOnceBench()
    bench.begin(0, 1)
    bench.finish(0, b"0")
    bench.broker.away = True
    bench.transact(10.0)
    bench.finish(1, b"1")

    bench.broker.away = False
    assert 0 <= bench.delivery.wants_turn_in_s(10.0) <= RETRY_CAP_S
    bench.executor.submitted.clear()
    bench.delivery.hurry()  # does not shorten the pause after a failure
    bench.transact(LATER)

    assert bench.published == [b"0"]
    assert bench.committed == {A: 1}
    assert bench.counts == {"retry publish": 1, "commit": 1}


@pytest.mark.parametrize("large", range(4))
def test_the_message_that_is_too_large_is_replaced_and_no_other(large):
    bench = ExactlyOnceBench(max_message_bytes=10)
    bench.begin(0, 1, 2)
    values = [b"x" * 50 if number == large else b"%d" % number for number in range(4)]
    bench.finish(0, values[0], values[1])
    bench.finish(1)
    bench.finish(2, values[2], values[3])

    bench.delivery.turn(0.0)
    bench.executor.run()
    assert bench.published == []
    bench.transact(0.0)

    assert bench.published == sorted(b"too large" if n == large else b"%d" % n for n in range(4))
    assert bench.committed == {A: 3}


def test_what_takes_the_place_of_a_refused_message_is_published_without_another_interval():
    bench = ExactlyOnceBench(interval_s=1.0)
    bench.broker.refused_topics = {"closed", "gone"}
    bench.begin(0, 1)
    last = Outgoing("out", b"k", b"instead")
    second = Outgoing("gone", b"k", b"", if_refused=lambda refused: last)
    bench.finish_with(0, Outgoing("closed", b"k", b"", if_refused=lambda refused: second))
    bench.finish(1, b"1")

    for _ in range(3):
        bench.transact(5.0)

    assert bench.published == [b"1", b"instead"]
    assert bench.committed == {A: 2}
    assert bench.counts == {"commit": 1}


def test_a_refused_message_that_nothing_replaces_ends_the_worker_with_a_sentence():
    bench = ExactlyOnceBench()
    bench.broker.refused_topics = {"closed"}
    bench.begin(0)
    bench.finish_with(0, Outgoing("closed", b"k", b"", if_refused=lambda refused: None))

    with pytest.raises(Misconfigured, match=r"topic closed .* create the topic"):
        bench.transact()


def test_an_error_without_remedy_ends_the_worker():
    bench = ExactlyOnceBench()
    bench.begin(0)
    bench.finish(0, b"0")
    bench.delivery.turn(0.0)
    future, _ = bench.executor.submitted.pop()
    future.set_exception(Misconfigured("not allowed"))

    with pytest.raises(Misconfigured):
        bench.delivery.turn(0.0)


def test_what_was_dropped_while_its_transaction_failed_is_not_repeated():
    bench = ExactlyOnceBench()
    bench.begin(0)
    bench.begin(0, partition=B)
    bench.finish(0, b"a")
    bench.finish(0, b"b", partition=B)
    bench.broker.away = True
    bench.delivery.turn(0.0)

    bench.delivery.drop([A])
    bench.begin(0)  # it came back, and its messages with it
    bench.executor.run()
    bench.broker.away = False
    bench.delivery.turn(0.0)
    bench.transact(LATER)

    assert bench.published == [b"b"]
    assert bench.committed == {B: 1}
    assert not bench.delivery.settled([A])
    assert bench.delivery.settled([B])


def test_what_was_dropped_before_its_transaction_is_not_published():
    bench = ExactlyOnceBench()
    bench.begin(0)
    bench.finish(0, b"a")
    bench.broker.away = True
    bench.transact(0.0)

    bench.executor.submitted.clear()
    bench.delivery.drop([A])
    bench.broker.away = False
    bench.delivery.turn(LATER)

    assert bench.executor.submitted == []
    assert bench.delivery.settled()

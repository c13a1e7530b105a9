"""Exactly once: the messages of finished records and their offsets are one transaction."""

from __future__ import annotations

import pytest

from delivery_harness import LATER, A, B, ExactlyOnceBench
from workers.delivery import UndeliveredLimits
from workers.errors import Misconfigured
from workers.ports import Outgoing
from workers.retrying import LOOP_MAX_PAUSE_S


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
    assert 0 <= bench.delivery.wants_turn_in_s(10.0) <= LOOP_MAX_PAUSE_S
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


def test_the_replacement_of_a_refused_message_is_published_without_another_interval():
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


def test_a_refused_message_without_a_replacement_is_tried_again_with_the_others():
    bench = ExactlyOnceBench()
    bench.broker.refused_topics = {"closed"}
    bench.begin(0, 1)
    bench.finish_with(0, Outgoing("closed", b"k", b"late", if_refused=lambda refused: None))
    bench.finish(1, b"1")

    bench.transact()
    assert (bench.published, bench.committed) == ([], {})
    bench.broker.refused_topics = set()
    bench.transact(LATER)

    assert bench.published == [b"1"]
    assert [record.value for record in bench.broker.log("closed")] == [b"late"]
    assert bench.committed == {A: 2}


def test_a_record_whose_topic_is_being_looked_up_holds_back_its_own_partition_only():
    bench = ExactlyOnceBench()
    unknown = {"elsewhere"}
    bench.outbox.is_decided = lambda topic: topic not in unknown
    bench.begin(0, 1)
    bench.begin(0, partition=B)
    bench.finish_with(0, Outgoing("elsewhere", b"k", b"0"))
    bench.finish(1, b"1")
    bench.finish(0, b"other", partition=B)

    bench.transact(0.0)
    assert bench.committed == {B: 1}
    unknown.clear()
    bench.transact(1.0)

    assert bench.committed == {A: 2, B: 1}


def test_too_many_undelivered_outcomes_leave_no_room_until_the_broker_has_them():
    bench = ExactlyOnceBench(limits=UndeliveredLimits(max_messages=2))
    bench.begin(0, 1, 2)
    bench.finish(1, b"1")
    bench.finish(2, b"2")
    assert not bench.delivery.has_room()
    bench.finish(0, b"0")

    bench.transact()

    assert bench.delivery.has_room()


def test_dropped_outcomes_are_undelivered_no_more():
    bench = ExactlyOnceBench(limits=UndeliveredLimits(max_messages=1))
    bench.begin(0, 1)
    bench.begin(0, partition=B)
    bench.finish(1, b"1")
    bench.finish(0, b"b", partition=B)
    bench.broker.away = True
    bench.transact()

    bench.delivery.drop([A, B])

    assert bench.delivery._undelivered.num_messages == 0


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

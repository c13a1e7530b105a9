"""At least once: nothing is committed before its messages are in the broker."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delivery_harness import LATER, A, AtLeastOnceBench, B, record, reply
from workers.delivery import UndeliveredLimits
from workers.errors import Misconfigured, TooLarge, TopicRefused, Transient
from workers.retrying import LOOP_MAX_PAUSE_S


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
    assert 0 <= bench.delivery.wants_turn_in_s(10.0) <= LOOP_MAX_PAUSE_S
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


@pytest.mark.parametrize("error", [Misconfigured("not allowed"), ZeroDivisionError()])
def test_an_error_without_a_remedy_ends_the_worker(error):
    bench = AtLeastOnceBench()
    bench.begin(0)
    bench.finish(0, reply())
    bench.outbox.settle(0, error)

    with pytest.raises(type(error)):
        bench.turn()


@pytest.mark.parametrize("refused", [TooLarge("no"), TopicRefused("no")])
def test_a_refused_message_without_a_replacement_is_sent_again_until_a_person_has_corrected_the_topic(refused):
    bench = AtLeastOnceBench()
    bench.begin(0)
    bench.finish(0, reply(fallback=None))
    bench.outbox.settle(0, refused)

    bench.turn(now=1.0)
    assert bench.committed == {}
    bench.turn(now=LATER)
    bench.outbox.settle(1)
    bench.turn(now=LATER)

    assert bench.outbox.values == [b"reply", b"reply"]
    assert bench.committed == {A: 1}


def test_messages_of_one_key_are_published_in_order():
    bench = AtLeastOnceBench()
    bench.begin(0, 1, 2)
    for offset in range(3):
        bench.finish(offset, reply(b"%d" % offset, key=b"image"))
    assert bench.outbox.values == [b"0"]

    bench.outbox.settle(0, Transient("away"))
    bench.turn(now=1.0)
    bench.turn(now=LATER)
    bench.outbox.settle(1)
    bench.turn(now=LATER)
    bench.outbox.settle(2)
    bench.turn(now=LATER)
    bench.outbox.settle(3)
    bench.turn(now=LATER)

    assert bench.outbox.values == [b"0", b"0", b"1", b"2"]
    assert bench.committed == {A: 3}


def test_the_replacement_of_a_refused_message_waits_behind_those_of_its_key():
    bench = AtLeastOnceBench()
    bench.begin(0, 1)
    bench.finish(0, reply(b"0", key=b"image"))
    bench.finish(1, reply(b"1", key=b"image"))

    bench.outbox.settle(0, TooLarge("no"))
    bench.turn()
    bench.outbox.settle(1)
    bench.turn()
    bench.outbox.settle(2)
    bench.turn()

    assert bench.outbox.values == [b"0", b"1", b"too large"]
    assert bench.committed == {A: 2}


def test_a_message_behind_a_dropped_one_of_its_key_is_sent():
    bench = AtLeastOnceBench()
    bench.begin(0)
    bench.begin(0, partition=B)
    bench.finish(0, reply(b"a", key=b"image"))
    bench.finish(0, reply(b"b", key=b"image"), partition=B)

    bench.delivery.drop([A])
    bench.outbox.settle(0, Transient("away"))
    bench.turn()
    bench.outbox.settle(1)
    bench.turn()

    assert bench.outbox.values == [b"a", b"b"]
    assert bench.committed == {B: 1}


@pytest.mark.parametrize("limits", [UndeliveredLimits(max_messages=2), UndeliveredLimits(max_bytes=10)])
def test_too_many_undelivered_outcomes_leave_no_room_until_the_broker_has_them(limits):
    bench = AtLeastOnceBench(limits=limits)
    bench.begin(0, 1)
    bench.finish(0, reply())
    assert bench.delivery.has_room()
    bench.finish(1, reply())

    assert not bench.delivery.has_room()
    bench.outbox.settle(0)
    bench.turn()

    assert bench.delivery.has_room()


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["ok", "transient", "refused", "drop"])), max_size=30))
def test_the_count_of_undelivered_messages_is_balanced(steps):
    bench = AtLeastOnceBench()
    offset = {A: 0, B: 0}
    for number, what in steps:
        partition = (A, B)[number % 2]
        if what == "drop":
            bench.delivery.drop([partition])
        else:
            bench.begin(offset[partition], partition=partition)
            bench.finish(offset[partition], reply(key=b"%d" % number), reply(), partition=partition)
            offset[partition] += 1
        for index, (_, future) in enumerate(list(bench.outbox.sent)):
            if not future.done() and index % 2 == 0:
                error = {"transient": Transient("away"), "refused": TooLarge("no")}.get(what)
                bench.outbox.settle(index, error)
        bench.turn(now=number)
    for round_ in range(200):
        for index, (_, future) in enumerate(list(bench.outbox.sent)):
            if not future.done():
                bench.outbox.settle(index)
        bench.turn(now=LATER * (round_ + 1))

    assert (bench.delivery._undelivered.num_messages, bench.delivery._undelivered.num_bytes) == (0, 0)
    assert bench.delivery.settled()
    assert not bench.delivery._behind


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

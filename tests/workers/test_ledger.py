"""The ledger: whatever the order in which messages finish, no offset passes one that is still in work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.ledger import Done, Ledger, commit_offsets
from workers.ports import Partition, Record

A, B = Partition("t", 0), Partition("t", 1)


def record(partition: Partition, offset: int, epoch: int = 0) -> Record:
    return Record(partition, offset, b"k", b"v", (), 0, epoch=epoch)


def test_a_finished_message_waits_for_an_earlier_one():
    ledger: Ledger[str] = Ledger()
    for offset in (5, 6, 9):
        ledger.begin(record(A, offset))

    ledger.finish(record(A, 6), "b")
    assert ledger.take_done() == []
    ledger.finish(record(A, 5), "a")

    assert ledger.take_done() == [Done(A, 5, "a"), Done(A, 6, "b")]
    assert ledger.num_open() == 1


def test_partitions_do_not_wait_for_each_other():
    ledger: Ledger[str] = Ledger()
    ledger.begin(record(A, 0))
    ledger.begin(record(B, 7))

    ledger.finish(record(B, 7), "b")

    assert ledger.take_done() == [Done(B, 7, "b")]
    assert (ledger.num_open([A]), ledger.num_open([B]), ledger.num_open()) == (1, 0, 1)


def test_a_limit_leaves_the_rest_for_the_next_call():
    ledger: Ledger[int] = Ledger()
    for offset in range(5):
        ledger.begin(record(A, offset))
        ledger.finish(record(A, offset), offset)

    assert [done.offset for done in ledger.take_done(3)] == [0, 1, 2]
    assert [done.offset for done in ledger.take_done(3)] == [3, 4]
    assert ledger.num_open() == 0


def test_a_message_cannot_be_in_work_twice():
    ledger: Ledger[None] = Ledger()
    ledger.begin(record(A, 1))

    with pytest.raises(ValueError, match="t-0 offset 1 is in work already"):
        ledger.begin(record(A, 1))


def test_finishing_twice_or_after_forgetting_returns_false():
    ledger: Ledger[None] = Ledger()
    ledger.begin(record(A, 1))
    ledger.begin(record(B, 1))

    assert ledger.finish(record(A, 1), None)
    assert not ledger.finish(record(A, 1), None)
    ledger.forget([B])
    assert not ledger.finish(record(B, 1), None)
    assert not ledger.finish(record(B, 99), None)


def test_a_forgotten_partition_can_begin_again():
    ledger: Ledger[None] = Ledger()
    ledger.begin(record(A, 1))
    ledger.forget([A, B])

    ledger.begin(record(A, 1))

    assert ledger.num_open() == 1


def test_an_outcome_of_an_earlier_assignment_has_no_effect():
    ledger: Ledger[None] = Ledger()
    ledger.begin(record(A, 1, epoch=1))
    ledger.forget([A])
    ledger.begin(record(A, 1, epoch=2))

    assert not ledger.is_open(record(A, 1, epoch=1))
    assert not ledger.finish(record(A, 1, epoch=1), None)
    assert ledger.finish(record(A, 1, epoch=2), None)


def test_a_message_that_is_not_ready_holds_back_its_own_partition_only():
    ledger: Ledger[str] = Ledger()
    for partition in (A, B):
        for offset in (0, 1):
            ledger.begin(record(partition, offset))
            ledger.finish(record(partition, offset), f"{partition.number}{offset}")

    done = ledger.take_done(is_ready=lambda payload: payload != "00")

    assert [message.payload for message in done] == ["10", "11"]
    assert ledger.num_open([A]) == 2


def test_forgetting_returns_the_payloads_of_finished_messages():
    ledger: Ledger[str] = Ledger()
    for offset in (0, 1):
        ledger.begin(record(A, offset))
    ledger.finish(record(A, 1), "finished")

    assert ledger.forget([A]) == ["finished"]


def test_the_offset_to_commit_is_one_past_the_last():
    assert commit_offsets([Done(A, 3, None), Done(B, 8, None), Done(A, 7, None)]) == {A: 8, B: 9}
    assert commit_offsets([]) == {}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "finish", "finish", "forget", "take", "take one"]),
        st.sampled_from([A, B]),
        st.integers(0, 12),
    ),
    max_size=80,
)


@given(STEPS)
def test_no_interleaving_hands_out_a_message_with_an_unfinished_one_before_it(steps):
    ledger: Ledger[int] = Ledger()
    open_: dict[Partition, dict[int, bool]] = {A: {}, B: {}}  # offset -> finished, in order of arrival
    next_offset = {A: 0, B: 0}
    for what, partition, number in steps:
        entries = open_[partition]
        if what == "begin":
            next_offset[partition] += 1 + number % 3  # offsets have gaps
            ledger.begin(record(partition, next_offset[partition]))
            entries[next_offset[partition]] = False
        elif what == "finish":
            was_open = entries.get(number) is False
            assert ledger.finish(record(partition, number), number) == was_open
            if was_open:
                entries[number] = True
        elif what == "forget":
            ledger.forget([partition])
            entries.clear()
        else:
            limit = 1 if what == "take one" else None
            done = ledger.take_done(limit)
            for message in done:
                oldest = next(iter(open_[message.partition]))
                assert message.offset == oldest
                assert open_[message.partition].pop(oldest), "it was not finished"
            ready = sum(next(iter(entries.values()), False) for entries in open_.values())
            assert len(done) == 1 or ready == 0 or limit is None
            if limit is None:
                assert ready == 0
            for partition, offset in commit_offsets(done).items():
                assert all(offset <= still_open for still_open in open_[partition])
        assert ledger.num_open() == len(open_[A]) + len(open_[B])

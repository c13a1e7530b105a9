"""What becomes of a transaction whose producer loses a request to the coordinator, as kafka-python does at times."""

from __future__ import annotations

import pytest
from kafka.errors import KafkaTimeoutError
from kafka.producer.transaction_manager import TransactionManager
from kafka.structs import ConsumerGroupMetadata

import workers.bus.transactions
from bus_harness import KafkaBus, eventually, messages, take, values
from workers.errors import Transient
from workers.ports import Commit

pytestmark = pytest.mark.services


@pytest.fixture
def kafka(kafka_brokers, unique_prefix, monkeypatch):
    monkeypatch.setattr(workers.bus.transactions, "COORDINATOR_LIMIT_S", 1.0)
    made = KafkaBus(kafka_brokers, unique_prefix)
    yield made
    made.close()


@pytest.fixture
def lost(monkeypatch):
    """The kinds of requests that no producer sends from now on, although it has taken them from its queue."""
    kinds = set()
    take_next = TransactionManager.next_request_handler

    def take_next_or_lose_it(self, has_incomplete_batches):
        taken = take_next(self, has_incomplete_batches)
        return None if type(taken).__name__ in kinds else taken

    monkeypatch.setattr(TransactionManager, "next_request_handler", take_next_or_lose_it)
    return kinds


@pytest.fixture
def inbox(kafka):
    made = kafka.inbox(kafka.topic("in"))
    eventually(made.assigned)
    return made


@pytest.mark.parametrize(
    "request_kind", ["AddPartitionsToTxnHandler", "AddOffsetsToTxnHandler", "TxnOffsetCommitHandler"]
)
def test_before_its_commit_it_fails_and_the_next_attempt_publishes_once(kafka, inbox, lost, request_kind):
    (partition,) = inbox.assigned()
    replies = kafka.topic("out")
    transactions = kafka.transactional_outbox(inbox, transaction_timeout_ms=1_000)

    lost.add(request_kind)
    with pytest.raises(Transient):
        transactions.publish(messages(replies, 1), {partition: Commit(0)})
    lost.clear()
    transactions.publish(messages(replies, 1, start=1), {partition: Commit(0)})

    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"1"]


def test_a_commit_that_was_lost_is_found_out_and_the_next_attempt_publishes_once(kafka, inbox, lost):
    (partition,) = inbox.assigned()
    replies = kafka.topic("out")
    transactions = kafka.transactional_outbox(inbox)

    lost.add("EndTxnHandler")
    with pytest.raises(Transient, match="was not committed"):
        transactions.publish(messages(replies, 1), {partition: Commit(1)})
    lost.clear()
    transactions.publish(messages(replies, 1, start=1), {partition: Commit(1)})

    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"1"]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(kafka, inbox, monkeypatch):
    (partition,) = inbox.assigned()
    replies = kafka.topic("out")
    transactions = kafka.transactional_outbox(inbox)
    commit = workers.bus.transactions.commit_transaction

    def commit_and_lose_the_answer(producer, limit_s):
        commit(producer, limit_s)
        raise KafkaTimeoutError("no answer")

    monkeypatch.setattr(workers.bus.transactions, "commit_transaction", commit_and_lose_the_answer)
    transactions.publish(messages(replies, 1), {partition: Commit(1)})
    monkeypatch.setattr(workers.bus.transactions, "commit_transaction", commit)
    transactions.publish(messages(replies, 1, start=1), {partition: Commit(2)})

    assert values(take(kafka.inbox(replies, group="readers"), 2)) == [b"0", b"1"]


def test_the_end_of_a_transaction_is_asked_for_until_a_broker_answers(kafka, inbox, monkeypatch):
    (partition,) = inbox.assigned()
    replies = kafka.topic("out")
    transactions = kafka.transactional_outbox(inbox)
    commit, committed = workers.bus.transactions.commit_transaction, transactions._committed

    def lose_the_answer(producer, limit_s):
        commit(producer, limit_s)
        raise KafkaTimeoutError("no answer")

    def away(partitions):
        raise Transient("no broker answers")

    monkeypatch.setattr(workers.bus.transactions, "commit_transaction", lose_the_answer)
    transactions._committed = away
    for _ in range(2):
        with pytest.raises(Transient, match="no broker answers"):
            transactions.publish(messages(replies, 1), {partition: Commit(1)})
    transactions._committed = committed
    transactions.publish(messages(replies, 1), {partition: Commit(1)})

    monkeypatch.setattr(workers.bus.transactions, "commit_transaction", commit)
    transactions.publish(messages(replies, 1, start=1), {partition: Commit(2)})
    assert values(take(kafka.inbox(replies, group="readers"), 2)) == [b"0", b"1"]


def test_an_abort_without_an_answer_is_left_to_the_next_producer(kafka, inbox, lost):
    (partition,) = inbox.assigned()
    replies = kafka.topic("out")
    now = inbox.membership()
    earlier = ConsumerGroupMetadata(now.group_id, now.generation_id - 1, now.member_id, None)
    memberships = [earlier, now]
    transactions = kafka.transactional_outbox(inbox, membership=lambda: memberships.pop(0))

    lost.add("EndTxnHandler")
    with pytest.raises(Transient):
        transactions.publish(messages(replies, 1), {partition: Commit(0)})
    lost.clear()
    transactions.publish(messages(replies, 1, start=1), {partition: Commit(0)})

    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"1"]

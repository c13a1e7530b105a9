"""What becomes of a transaction whose producer loses a request to the coordinator, as kafka-python does at times."""

from __future__ import annotations

import pytest
from kafka.producer.transaction_manager import TransactionManager
from kafka.structs import ConsumerGroupMetadata

import workers.bus.transactions
from bus_harness import KafkaBus, eventually, messages, take, values
from workers.errors import Transient

pytestmark = pytest.mark.services


@pytest.fixture
def kafka(kafka_brokers, unique_prefix, monkeypatch):
    monkeypatch.setattr(workers.bus.transactions, "COMMIT_LIMIT_S", 1.0)
    monkeypatch.setattr(workers.bus.transactions, "ABORT_LIMIT_S", 1.0)
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
        transactions.publish(messages(replies, 1), {partition: 0})
    lost.clear()
    transactions.publish(messages(replies, 1, start=1), {partition: 0})

    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"1"]


def test_a_commit_that_nobody_answers_ends_the_worker(kafka, inbox, lost):
    (partition,) = inbox.assigned()
    transactions = kafka.transactional_outbox(inbox)

    lost.add("EndTxnHandler")
    with pytest.raises(RuntimeError, match=r"whether a transaction was committed is not known: .* in 1 s"):
        transactions.publish(messages(kafka.topic("out"), 1), {partition: 0})


def test_an_abort_that_nobody_answers_is_left_to_the_next_producer(kafka, inbox, lost):
    (partition,) = inbox.assigned()
    replies = kafka.topic("out")
    now = inbox.membership()
    earlier = ConsumerGroupMetadata(now.group_id, now.generation_id - 1, now.member_id, None)
    memberships = [earlier, now]
    transactions = kafka.transactional_outbox(inbox, membership=lambda: memberships.pop(0))

    lost.add("EndTxnHandler")
    with pytest.raises(Transient):
        transactions.publish(messages(replies, 1), {partition: 0})
    lost.clear()
    transactions.publish(messages(replies, 1, start=1), {partition: 0})

    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"1"]

"""The contract of a bus, held by the twin and by a real Kafka; then what only a real group and a real producer do."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import MemberToRemove
from kafka.errors import NodeNotReadyError
from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata

import workers.bus.arrivals
import workers.bus.assigned
import workers.bus.consumer
import workers.bus.topics
from bus_harness import (
    LIMIT_S,
    MAX_MESSAGE_BYTES,
    KafkaBus,
    MemoryBus,
    eventually,
    messages,
    open_all,
    send_all,
    take,
    values,
)
from workers.bus import kafka_internals
from workers.bus.kafka_internals import clear_exhausted_partition
from workers.errors import TooLarge, TopicRefused, Transient
from workers.partitions import Marker
from workers.ports import Commit, Outgoing, Partition

BIG = b"x" * 100_000


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.services)])
def bus(request, unique_prefix):
    if request.param == "memory":
        made = MemoryBus(unique_prefix)
    else:
        made = KafkaBus(request.getfixturevalue("kafka_brokers"), unique_prefix)
    yield made
    made.close()


@pytest.fixture
def kafka(kafka_brokers, unique_prefix):
    made = KafkaBus(kafka_brokers, unique_prefix)
    yield made
    made.close()


def test_messages_arrive_in_order_with_key_and_headers(bus):
    topic = bus.topic("in")
    sent = messages(topic, 300)
    send_all(bus.outbox(), sent)

    records = take(bus.inbox(topic), 300)

    assert [(r.partition, r.key, r.value, r.headers) for r in records] == [
        (Partition(topic, 0), message.key, message.value, message.headers) for message in sent
    ]
    assert [record.offset for record in records] == list(range(300))
    assert abs(records[0].timestamp_ms / 1000 - time.time()) < 600


def test_every_partition_keeps_its_own_order(bus):
    topic = bus.topic("in", partitions=3)
    sent = [Outgoing(topic, b"%d" % (n % 7), b"%d" % n) for n in range(70)]
    send_all(bus.outbox(), sent)
    inbox = bus.inbox(topic)

    records = take(inbox, 70)

    assert inbox.assigned() == {Partition(topic, number) for number in range(3)}
    for key in range(7):
        of_key = [int(record.value) for record in records if record.key == b"%d" % key]
        assert of_key == list(range(key, 70, 7))


def test_the_next_member_of_a_group_continues_after_what_was_committed(bus):
    topic = bus.topic("in")
    send_all(bus.outbox(), messages(topic, 5))
    first = bus.inbox(topic)
    take(first, 5)
    first.commit({Partition(topic, 0): Commit(3)}).result(LIMIT_S)
    first.close(5.0)

    assert values(take(bus.inbox(topic), 2)) == [b"3", b"4"]


def test_what_was_not_committed_is_delivered_again(bus):
    topic = bus.topic("in")
    send_all(bus.outbox(), messages(topic, 3))
    first = bus.inbox(topic)
    take(first, 3)
    first.close(5.0)

    assert values(take(bus.inbox(topic), 3)) == [b"0", b"1", b"2"]


def test_the_lag_is_what_has_not_been_taken(bus):
    topic = bus.topic("in", partitions=2)
    send_all(bus.outbox(), [Outgoing(topic, None if n % 2 else b"key", b"%d" % n) for n in range(20)])
    inbox = bus.inbox(topic)

    eventually(lambda: sum(inbox.lag().values()) == 20)
    take(inbox, 15)
    eventually(lambda: sum(inbox.lag().values()) == 5)


def test_a_held_member_takes_no_more_and_commits(bus):
    topic = bus.topic("in")
    send_all(bus.outbox(), messages(topic, 5))
    first = bus.inbox(topic)
    take(first, 3)

    first.hold()
    assert first.take() is None
    first.commit({Partition(topic, 0): Commit(2)}).result(LIMIT_S)
    first.close(5.0)

    assert values(take(bus.inbox(topic), 3)) == [b"2", b"3", b"4"]


def test_a_message_over_the_producers_limit_fails_alone(bus):
    topic = bus.topic("out")
    outbox = bus.outbox()

    refused = outbox.send(Outgoing(topic, None, b"x" * (MAX_MESSAGE_BYTES + 1)))
    send_all(outbox, messages(topic, 2))

    assert isinstance(refused.exception(LIMIT_S), TooLarge)
    assert values(take(bus.inbox(topic), 2)) == [b"0", b"1"]


def test_a_message_over_the_brokers_limit_fails_alone(bus):
    topic = bus.topic("out", max_message_bytes=50_000)
    outbox = bus.outbox()
    sent = [*messages(topic, 3), Outgoing(topic, b"key", BIG), *messages(topic, 3, start=3)]

    futures = [outbox.send(message) for message in sent]
    failed = [isinstance(future.exception(LIMIT_S), TooLarge) for future in futures]
    send_all(outbox, messages(topic, 1, start=6))

    assert failed == [False] * 3 + [True] + [False] * 3
    assert sorted(values(take(bus.inbox(topic), 7))) == [b"%d" % number for number in range(7)]


def test_a_transaction_publishes_its_messages_and_moves_the_offsets(bus):
    topic, replies = bus.topic("in"), bus.topic("out")
    send_all(bus.outbox(), messages(topic, 4))
    inbox = bus.inbox(topic)
    take(inbox, 4)

    outbox = bus.transactional_outbox(inbox)
    outbox.publish(messages(replies, 2), {Partition(topic, 0): Commit(2)})
    outbox.publish(messages(replies, 1, start=2), {Partition(topic, 0): Commit(3)})
    inbox.close(5.0)

    assert values(take(bus.inbox(replies, group="readers"), 3)) == [b"0", b"1", b"2"]
    assert values(take(bus.inbox(topic), 1)) == [b"3"]


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES + 1, len(BIG)], ids=["by the producer", "by the broker"])
def test_a_message_refused_in_a_transaction_is_named_and_nothing_is_published(bus, size):
    topic = bus.topic("in")
    replies = bus.topic("out", partitions=1, max_message_bytes=50_000)
    send_all(bus.outbox(), messages(topic, 4))
    inbox = bus.inbox(topic)
    take(inbox, 4)
    outbox = bus.transactional_outbox(inbox)
    wanted = [*messages(replies, 2), Outgoing(replies, b"key", b"x" * size), *messages(replies, 2, start=2)]

    with pytest.raises(TooLarge) as refused:
        outbox.publish(wanted, {Partition(topic, 0): Commit(4)})
    outbox.publish(messages(replies, 1, start=9), {Partition(topic, 0): Commit(1)})
    inbox.close(5.0)

    assert refused.value.message_number == 2
    assert values(take(bus.inbox(replies, group="readers"), 1)) == [b"9"]
    assert values(take(bus.inbox(topic), 3)) == [b"1", b"2", b"3"]


def test_a_refused_topic_refuses_its_messages_and_no_others(bus, monkeypatch):
    monkeypatch.setattr(workers.bus.topics, "APPEARANCE_S", 0.5)
    topic, replies = bus.topic("in"), bus.topic("out")
    send_all(bus.outbox(), messages(topic, 1))
    inbox = bus.inbox(topic)
    take(inbox, 1)
    outbox, transactions = bus.outbox(), bus.transactional_outbox(inbox)
    refused = Outgoing(bus.refused_topic(), b"key", b"")

    futures = [outbox.send(message) for message in (*messages(replies, 1), refused, *messages(replies, 1, start=1))]
    outcomes = [type(future.exception(LIMIT_S)) for future in futures]
    with pytest.raises(TopicRefused) as named:
        transactions.publish([*messages(replies, 1, start=7), refused, refused], {Partition(topic, 0): Commit(1)})
    transactions.publish(messages(replies, 1, start=2), {Partition(topic, 0): Commit(1)})

    assert outcomes == [type(None), TopicRefused, type(None)]
    assert named.value.message_number in (1, 2)
    assert sorted(values(take(bus.inbox(replies, group="readers"), 3))) == [b"0", b"1", b"2"]


def test_messages_that_only_together_are_too_large_are_all_published(bus):
    topic, tight = bus.topic("in"), bus.topic("tight", max_message_bytes=4_000)
    inbox = bus.inbox(topic)
    eventually(inbox.assigned)
    sent = [Outgoing(tight, b"key", b"%d" % number + b"x" * 1_500) for number in range(8)]

    send_all(bus.outbox(), sent)
    bus.transactional_outbox(inbox).publish(sent, {Partition(topic, 0): Commit(0)})

    read = values(take(bus.inbox(tight, group="readers"), 16))
    assert sorted(read) == sorted([message.value for message in sent] * 2)


@pytest.mark.services
def test_the_refused_one_of_several_large_messages_is_named(kafka):
    topic, tight, wide = kafka.topic("in"), kafka.topic("tight", max_message_bytes=50_000), kafka.topic("wide")
    inbox = kafka.inbox(topic)
    eventually(inbox.assigned)
    outbox = kafka.transactional_outbox(inbox)
    wanted = [Outgoing(wide, None, BIG + b"x"), Outgoing(tight, None, BIG), Outgoing(wide, None, BIG + b"y")]

    with pytest.raises(TooLarge) as refused:
        outbox.publish(wanted, {Partition(topic, 0): Commit(0)})

    assert refused.value.message_number == 1


@pytest.mark.services
def test_partitions_change_hands_after_their_offsets_are_committed(kafka):
    topic = kafka.topic("in", partitions=2)
    sent = [Outgoing(topic, b"%d" % n, b"%d" % n) for n in range(40)]
    send_all(kafka.outbox(), sent)
    first = kafka.inbox(topic)
    taken = take(first, 40)

    second = kafka.inbox(topic)
    noticed_s = eventually(lambda: len(first.assigned()) == 1)
    revocations = []
    eventually(lambda: revocations.extend(first.revocations()) or revocations)
    (revocation,) = revocations
    (moved,) = revocation.partitions
    of_moved = [record for record in taken if record.partition == moved]
    send_all(kafka.outbox(), sent)
    first.commit({moved: Commit(of_moved[-2].offset + 1)}).result(LIMIT_S)
    assert not second.assigned()
    revocation.release()
    moved_s = eventually(lambda: moved in second.assigned())

    assert not revocation.lost
    assert take(second, 1)[0].offset == of_moved[-1].offset
    assert {record.partition for record in take(first, 1)} == first.assigned() == first.lag().keys()
    assert noticed_s < 2.5
    assert moved_s < 2.0


@pytest.mark.services
def test_a_held_member_commits_while_others_wait_to_rebalance_and_they_go_on_when_it_leaves(kafka):
    topic = kafka.topic("in", partitions=2)
    first = kafka.inbox(topic)
    eventually(lambda: len(first.assigned()) == 2)

    first.hold()
    second = kafka.inbox(topic)
    eventually(lambda: first._consumer._coordinator.need_rejoin())  # the answer to a heartbeat announces it
    committed = [first.commit({Partition(topic, 0): Commit(number)}).exception(LIMIT_S) for number in range(3)]
    assert not second.assigned()
    first.close(5.0)

    assert committed == [None] * 3
    eventually(lambda: len(second.assigned()) == 2)


@pytest.mark.services
@pytest.mark.parametrize("revocation_is_pending", [False, True])
def test_a_closed_member_leaves_its_partitions_at_once(kafka, revocation_is_pending):
    topic = kafka.topic("in", partitions=2)
    first = kafka.inbox(topic)
    eventually(lambda: len(first.assigned()) == 2)
    if revocation_is_pending:
        second = kafka.inbox(topic)
        eventually(first.revocations)
    else:
        second = kafka.inbox(topic, group="other")

    started = time.monotonic()
    first.close(10.0)
    closed_s = time.monotonic() - started
    if not revocation_is_pending:
        second = kafka.inbox(topic)
    eventually(lambda: len(second.assigned()) == 2)

    assert closed_s < 1.0
    assert time.monotonic() - started < 3.0


@pytest.mark.services
def test_a_member_that_was_removed_reports_lost_partitions_and_rejoins(kafka):
    topic = kafka.topic("in")
    send_all(kafka.outbox(), messages(topic, 3))
    inbox = kafka.inbox(topic)
    take(inbox, 3)
    admin = KafkaAdminClient(**kafka.connection)
    member = MemberToRemove(member_id=inbox.membership().member_id)
    admin.remove_group_members(kafka.prefix + "group", [member])
    admin.close()

    revocations = []
    eventually(lambda: revocations.extend(inbox.revocations()) or revocations)
    held_back = inbox.take()
    late = inbox.commit({Partition(topic, 0): Commit(3)})
    revocations[0].release()

    assert revocations[0].lost
    assert held_back is None
    assert isinstance(late.exception(LIMIT_S), Transient)
    assert values(take(inbox, 3)) == [b"0", b"1", b"2"]


@pytest.mark.services
def test_a_full_queue_stops_the_polling_and_an_emptied_one_resumes_it(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.arrivals, "MAX_WAITING_RECORDS", 8)
    topic = kafka.topic("in")
    send_all(kafka.outbox(), messages(topic, 200))
    inbox = kafka.inbox(topic, max_poll_records=4)

    eventually(lambda: open_all(inbox) or len(inbox._arrivals._waiting) >= 8)
    eventually(lambda: sum(inbox.lag().values()) == 200)
    most = len(inbox._arrivals._waiting)
    records = take(inbox, 200)

    assert most < 8 + 4
    assert values(records) == [b"%d" % number for number in range(200)]


@pytest.mark.services
def test_the_lag_of_a_full_queue_grows_with_what_is_published(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.arrivals, "MAX_WAITING_RECORDS", 8)
    topic = kafka.topic("in", partitions=4)
    sent = [Outgoing(topic, b"%d" % n, b"") for n in range(100)]
    send_all(kafka.outbox(), sent)
    inbox = kafka.inbox(topic, max_poll_records=4)
    eventually(lambda: open_all(inbox) or len(inbox._arrivals._waiting) >= 8)

    send_all(kafka.outbox(), sent)

    eventually(lambda: sum(inbox.lag().values()) == 200)


@pytest.mark.services
def test_polled_records_stay_when_the_lag_cannot_be_looked_up(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.assigned, "LAG_INTERVAL_S", 0.0)
    topic = kafka.topic("in")
    send_all(kafka.outbox(), messages(topic, 20))
    inbox = kafka.inbox(topic, max_poll_records=4)
    take(inbox, 1)

    def away(*args: object, **kwargs: object) -> None:
        raise NodeNotReadyError

    monkeypatch.setattr(inbox._consumer, "end_offsets", away)

    assert values(take(inbox, 19)) == [b"%d" % number for number in range(1, 20)]


@pytest.mark.services
def test_members_with_full_queues_share_with_a_new_one_in_few_rebalances(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.arrivals, "MAX_WAITING_RECORDS", 8)
    topic = kafka.topic("in", partitions=6)
    send_all(kafka.outbox(), [Outgoing(topic, b"%d" % n, b"") for n in range(200)])
    members = [kafka.inbox(topic, max_poll_records=4)]

    def shared() -> bool:
        for member in members:
            open_all(member)
        return all(
            len(member.assigned()) == 6 // len(members) and len(member._arrivals._waiting) >= 8 for member in members
        )

    eventually(shared)
    members.append(kafka.inbox(topic, max_poll_records=4))
    eventually(shared)
    before = members[0].membership().generation_id
    members.append(kafka.inbox(topic, max_poll_records=4))
    eventually(shared)

    # One in which partitions are given back, one in which the new member gets them; and rarely one more, for a join
    # that ended just between two polls.
    assert 2 <= members[0].membership().generation_id - before <= 3


@pytest.mark.services
def test_records_set_aside_during_a_pause_are_returned_after_it(kafka):
    paused, other = TopicPartition(kafka.topic("in"), 0), TopicPartition(kafka.topic("other"), 0)
    send_all(kafka.outbox(), [*messages(paused.topic, 10), *messages(other.topic, 10)])
    consumer = KafkaConsumer(**kafka.connection, auto_offset_reset="earliest", max_poll_records=4)
    came: dict[TopicPartition, int] = {paused: 0, other: 0}

    def all_came(partition: TopicPartition) -> bool:
        clear_exhausted_partition(consumer)
        for each, records in consumer.poll(timeout_ms=100).items():
            came[each] += len(records)
        return came[partition] == 10

    with contextlib.closing(consumer):
        consumer.assign([paused])
        eventually(lambda: all_came(paused) or came[paused] == 4)
        consumer.pause(paused)
        consumer.assign([paused, other])
        consumer.pause(paused)
        eventually(lambda: all_came(other))
        consumer.resume(paused)
        eventually(lambda: all_came(paused))


@pytest.mark.services
def test_large_records_fill_the_queue_by_their_bytes(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.arrivals, "MAX_WAITING_BYTES", 3 * len(BIG))
    topic = kafka.topic("in")
    send_all(kafka.outbox(), [Outgoing(topic, None, BIG)] * 20)
    inbox = kafka.inbox(topic, max_poll_records=1)

    eventually(lambda: open_all(inbox) or (sum(inbox.lag().values()) == 20 and len(inbox._arrivals._waiting) > 0))
    most = len(inbox._arrivals._waiting)
    take(inbox, 20)

    assert most <= 3


@pytest.mark.services
def test_commits_from_many_turns_go_on_while_the_group_rebalances(kafka):
    topic = kafka.topic("in", partitions=4)
    first = kafka.inbox(topic)
    eventually(lambda: len(first.assigned()) == 4)
    second = kafka.inbox(topic)
    outcomes, revocations = [], []

    def commit_until_the_partitions_have_moved():
        outcomes.append(first.commit({Partition(topic, n): Commit(0) for n in range(4)}).exception(LIMIT_S))
        for revocation in first.revocations():
            revocations.append(revocation)
            revocation.release()
        return len(second.assigned()) == 2

    eventually(commit_until_the_partitions_have_moved)

    assert {type(outcome) for outcome in outcomes} <= {type(None), Transient}
    assert len(revocations) == 1


@pytest.mark.services
def test_a_transaction_of_an_earlier_membership_is_refused_and_the_next_one_passes(kafka):
    topic, replies = kafka.topic("in"), kafka.topic("out")
    send_all(kafka.outbox(), messages(topic, 2))
    inbox = kafka.inbox(topic)
    take(inbox, 2)
    now = inbox.membership()
    memberships = [
        ConsumerGroupMetadata(now.group_id, now.generation_id - 1, now.member_id, None),
        ConsumerGroupMetadata(now.group_id, -1, "", None),
        now,
    ]
    outbox = kafka.transactional_outbox(inbox, membership=lambda: memberships.pop(0))

    for _ in range(2):
        with pytest.raises(Transient):
            outbox.publish(messages(replies, 1), {Partition(topic, 0): Commit(2)})
    outbox.publish(messages(replies, 1, start=1), {Partition(topic, 0): Commit(1)})

    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"1"]


@pytest.mark.services
def test_a_fenced_producer_is_replaced(kafka):
    topic, replies = kafka.topic("in"), kafka.topic("out")
    inbox = kafka.inbox(topic)
    eventually(inbox.assigned)
    outbox = kafka.transactional_outbox(inbox)
    kafka.transactional_outbox(inbox)  # of the same name

    with pytest.raises(Transient):
        outbox.publish(messages(replies, 1), {Partition(topic, 0): Commit(0)})
    outbox.publish(messages(replies, 1, start=1), {Partition(topic, 0): Commit(0)})

    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"1"]


@pytest.mark.services
def test_a_new_owner_waits_for_the_open_transaction_of_the_last_one(kafka):
    topic = kafka.topic("in")
    send_all(kafka.outbox(), messages(topic, 3))
    first = kafka.inbox(topic)
    take(first, 3)
    producer = KafkaProducer(**kafka.connection, transactional_id=kafka.prefix + "slow")
    producer.init_transactions()
    producer.begin_transaction()
    offsets = {TopicPartition(topic, 0): OffsetAndMetadata(2, "", -1)}
    producer.send_offsets_to_transaction(offsets, first.membership())
    first.close(5.0)

    second = kafka.inbox(topic)
    eventually(second.assigned)
    none_yet = threading.Event().wait(0.5) or second.take()
    producer.commit_transaction()
    producer.close()

    assert none_yet is None
    assert values(take(second, 1)) == [b"2"]


@pytest.mark.services
def test_a_join_that_outlasts_its_poll_is_not_forgotten(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.consumer, "POLL_S", 0.001)
    for number in range(5):
        topic = kafka.topic(f"in{number}")
        inbox = kafka.inbox(topic, group=f"group{number}")

        eventually(inbox.assigned, limit_s=10.0)
        inbox.close(5.0)


@pytest.mark.services
def test_an_error_on_the_polling_thread_is_raised_to_the_taker(kafka, monkeypatch):
    inbox = kafka.inbox(kafka.topic("in"))

    monkeypatch.setattr(inbox, "_poll", lambda: 1 // 0)

    def has_raised():
        try:
            inbox.take()
        except ZeroDivisionError:
            return True

    eventually(has_raised)


def test_a_member_has_joined_once_it_has_its_share_of_the_partitions(bus):
    inbox = bus.inbox(bus.topic("in"))

    eventually(inbox.joined)


@pytest.mark.services
def test_a_partition_that_is_added_is_read_within_seconds(kafka):
    topic = kafka.topic("in")
    inbox, outbox = kafka.inbox(topic), kafka.outbox()
    send_all(outbox, messages(topic, 1))
    take(inbox, 1)

    with contextlib.closing(KafkaAdminClient(**kafka.connection)) as admin:
        admin.create_partitions({topic: 2})
    eventually(lambda: outbox.send(Outgoing(topic, None, b"added", partition=1)).exception(LIMIT_S) is None)
    started = time.monotonic()

    assert values(take(inbox, 1)) == [b"added"]
    assert time.monotonic() - started < 15.0


@pytest.mark.services
def test_a_topic_that_is_deleted_and_created_again_is_read_from_its_beginning_as_a_new_assignment(kafka):
    topic = kafka.topic("in")
    partition = Partition(topic, 0)
    inbox, outbox = kafka.inbox(topic), kafka.outbox()
    send_all(outbox, messages(topic, 3))
    records = take(inbox, 3)
    topic_id = kafka_internals.topic_id(inbox._consumer, topic)
    inbox.commit({partition: Commit(3, str(Marker(1, 0, topic_id)))}).result(LIMIT_S)

    with contextlib.closing(KafkaAdminClient(**kafka.connection)) as admin:
        admin.delete_topics([topic])
    eventually(lambda: is_created(kafka, "in"))
    again = kafka.outbox()
    send_all(again, messages(topic, 5, start=10))
    found: dict[bytes, int] = {}

    def has_all() -> bool:
        open_all(inbox)
        while (record := inbox.take()) is not None:
            found[record.value] = max(record.epoch, found.get(record.value, 0))
        return set(found) >= {b"%d" % number for number in range(10, 15)}

    eventually(has_all)
    assert all(epoch > records[0].epoch for value, epoch in found.items() if int(value) >= 10)


def is_created(kafka: KafkaBus, name: str) -> bool:
    try:
        kafka.topic(name)
    except Exception:  # the deletion is not complete yet
        return False
    return True


@pytest.mark.parametrize("kind", ["outbox", "transactional", "follower"])
def test_a_broker_that_creates_topics_on_demand_creates_none_for_a_worker(kafka, monkeypatch, kind):
    monkeypatch.setattr(workers.bus.topics, "APPEARANCE_S", 0.5)
    absent = f"{kafka.prefix}absent"

    if kind == "outbox":
        with pytest.raises(TopicRefused):
            kafka.outbox().send(Outgoing(absent, b"key", b"value")).result(LIMIT_S)
    elif kind == "transactional":
        inbox = kafka.inbox(kafka.topic("in"))
        eventually(inbox.assigned)
        outbox = kafka.transactional_outbox(inbox)
        with pytest.raises(TopicRefused):
            outbox.publish([Outgoing(absent, b"key", b"value")], {})
    else:
        with contextlib.suppress(Transient):
            kafka.follower(absent).take()

    with contextlib.closing(KafkaAdminClient(**kafka.connection)) as admin:
        assert absent not in admin.list_topics()

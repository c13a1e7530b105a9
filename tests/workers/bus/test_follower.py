"""A follower reads what is new without a group, and reports what it may have missed."""

from __future__ import annotations

import contextlib

import pytest
from kafka import KafkaAdminClient, TopicPartition

import workers.bus.reader
from bus_harness import KafkaBus, MemoryBus, eventually, messages, send_all
from workers.bus.reader import RECREATED, REMOVED, SILENCE
from workers.errors import TopicRefused
from workers.ports import Gap, Outgoing, Partition


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


@pytest.fixture
def admin(kafka_brokers):
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=kafka_brokers.split(","))) as made:
        yield made


def taken(follower, number: int) -> list:
    found: list = []

    def has_all() -> bool:
        while len(found) < number and (record := follower.take()) is not None:
            found.append(record)
        return len(found) == number

    eventually(has_all)
    return found


def test_a_follower_reads_what_is_published_after_it_was_made(bus):
    topic = bus.topic("events", partitions=2)
    outbox = bus.outbox()
    send_all(outbox, messages(topic, 3))

    follower = bus.follower(topic)
    assert follower.take() is None
    send_all(outbox, [*messages(topic, 2, start=3), Outgoing(topic, b"key", None), Outgoing(topic, b"key", b"")])

    assert [record.value for record in taken(follower, 4)] == [b"3", b"4", None, b""]


def test_a_follower_of_one_partition_reads_what_is_directed_there(bus):
    topic = bus.topic("replies", partitions=3)
    woken = []
    follower = bus.follower(topic, partitions=[2], wake=lambda: woken.append(True))

    send_all(bus.outbox(), [Outgoing(topic, b"key", b"%d" % number, partition=number) for number in (0, 2, 1, 2)])

    assert [(record.partition, record.value) for record in taken(follower, 2)] == [(Partition(topic, 2), b"2")] * 2
    assert woken


def test_a_partition_that_does_not_exist_is_refused(bus):
    topic = bus.topic("replies", partitions=3)

    refused = bus.outbox().send(Outgoing(topic, b"key", b"value", partition=3))

    assert isinstance(refused.exception(30), TopicRefused)


def test_a_gap_is_reported_before_what_follows_it():
    bus = MemoryBus("t")
    topic = bus.topic("events")
    follower = bus.follower(topic)
    send_all(bus.outbox(), messages(topic, 1))

    follower.lose(0)
    send_all(bus.outbox(), messages(topic, 1, start=1))

    gap, record = taken(follower, 2)
    assert (gap, record.value) == (Gap(Partition(topic, 0), "records were removed"), b"1")


@pytest.mark.services
def test_a_topic_that_is_created_later_is_read_from_its_beginning(kafka):
    topic = kafka.prefix + "late"
    follower = kafka.follower(topic)

    kafka.topic("late", partitions=2)
    send_all(kafka.outbox(), messages(topic, 3))

    assert [record.value for record in taken(follower, 3)] == [b"0", b"1", b"2"]


@pytest.mark.services
def test_a_partition_that_is_added_is_read_from_its_beginning(kafka, admin):
    topic = kafka.topic("grows")
    follower = kafka.follower(topic)

    admin.create_partitions({topic: 2})
    outbox = kafka.outbox()
    added = Outgoing(topic, b"key", b"1", partition=1)
    eventually(lambda: outbox.send(added).exception(30) is None)

    assert taken(follower, 1)[0].partition == Partition(topic, 1)


@pytest.mark.services
def test_records_that_the_broker_removes_before_they_are_read_are_a_gap(kafka, admin, monkeypatch):
    monkeypatch.setattr("workers.bus.follower.MAX_WAITING_RECORDS", 1)
    topic = kafka.topic("short")
    outbox = kafka.outbox()
    follower = kafka.follower(topic)
    send_all(outbox, messages(topic, 1))
    eventually(lambda: follower._is_full())

    send_all(outbox, messages(topic, 5, start=1))
    admin.delete_records({TopicPartition(topic, 0): 4})
    first, gap, *rest = taken(follower, 4)

    assert first.value == b"0"
    assert gap == Gap(Partition(topic, 0), REMOVED)
    assert [record.value for record in rest] == [b"4", b"5"]


@pytest.mark.services
def test_a_topic_that_is_deleted_and_created_again_is_a_gap_and_read_from_its_beginning(kafka, admin):
    topic = kafka.topic("again")
    outbox = kafka.outbox()
    follower = kafka.follower(topic)
    send_all(outbox, messages(topic, 2))
    taken(follower, 2)

    admin.delete_topics([topic])
    recreate(kafka, "again")
    again = kafka.outbox()
    send_all(again, messages(topic, 5, start=2))

    # Until that is found out, the old position may point at records of the new topic, or behind them.
    while taken(follower, 1)[0] != Gap(Partition(topic, 0), RECREATED):
        pass
    assert [record.value for record in taken(follower, 5)] == [b"2", b"3", b"4", b"5", b"6"]


def recreate(kafka: KafkaBus, name: str) -> None:
    def is_created() -> bool:
        try:
            kafka.topic(name)
        except Exception:  # the deletion is not complete yet
            return False
        return True

    eventually(is_created)


@pytest.mark.services
def test_a_silence_in_which_tombstones_may_have_been_compacted_is_a_gap(kafka, monkeypatch):
    topic = kafka.topic("quiet")
    follower = kafka.follower(topic)
    assert follower.take() is None

    monkeypatch.setattr(workers.bus.reader, "MAX_SILENCE_S", 60.0)
    since = [61.0]
    monkeypatch.setattr(workers.bus.reader, "seconds_since_contact", lambda consumer: since[0])
    eventually(lambda: follower._reader._longest_silence_s == 61.0)
    since[0] = 0.1

    assert taken(follower, 1) == [Gap(Partition(topic, 0), SILENCE)]

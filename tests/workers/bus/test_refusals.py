"""Messages, topics and permissions that a real Kafka refuses, and records as any client may have written them."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType

import workers.bus.topics
from bus_harness import LIMIT_S, KafkaBus, eventually, messages, send_all, take, values
from delivery_harness import Counted
from services import KafkaServer
from workers.bus.permissions import check_access
from workers.bus.reader import KafkaReader
from workers.delivery import UndeliveredLimits
from workers.errors import Misconfigured, TopicRefused, Transient
from workers.exactly_once import ExactlyOnce
from workers.partitions import Partitions
from workers.ports import Commit, Finished, Outgoing, Partition
from workers.telemetry.bus_spans import BusSpans

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Kafka that creates no topics by itself and checks permissions."""
    made = KafkaServer(
        tmp_path_factory.mktemp("kafka") / "kafka",
        {
            "auto.create.topics.enable": "false",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
        },
    )
    made.start()
    yield made
    made.stop()


@pytest.fixture
def kafka(server, unique_prefix, monkeypatch):
    monkeypatch.setattr(workers.bus.topics, "APPEARANCE_S", 1.0)
    made = KafkaBus(server.brokers, unique_prefix)
    yield made
    made.close()


def allow_only(kafka: KafkaBus, topic: str, operation: ACLOperation) -> None:
    pattern = ResourcePattern(ResourceType.TOPIC, topic)
    with contextlib.closing(KafkaAdminClient(**kafka.connection)) as admin:
        admin.create_acls([ACL("User:ANONYMOUS", "*", operation, ACLPermissionType.ALLOW, pattern)])


def transactions_of(kafka: KafkaBus):
    """A transactional outbox, and the offsets to publish with."""
    topic = kafka.topic("in")
    inbox = kafka.inbox(topic)
    eventually(inbox.assigned)
    return kafka.transactional_outbox(inbox), {Partition(topic, 0): Commit(0)}


def write(kafka: KafkaBus, topic: str, headers) -> None:
    """Write what `KafkaProducer.send` would not, behind a message that it does send."""
    with contextlib.closing(KafkaProducer(**kafka.connection, linger_ms=60_000)) as producer:
        producer.send(topic, key=b"key", value=b"0")
        ((batch,),) = producer._accumulator._batches.values()
        batch.records.append(None, b"key", b"1", headers)
        producer.flush()


class Latin(str):
    """A header's name in Latin-1, as other clients may write it."""

    def encode(self, *_) -> bytes:
        return super().encode("latin-1")


def test_a_topic_that_does_not_exist_refuses_its_messages_and_holds_up_no_other(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.topics, "APPEARANCE_S", 1000.0)
    topic = kafka.topic("out")
    outbox = kafka.outbox()
    send_all(outbox, messages(topic, 1))

    unknown = [outbox.send(Outgoing(f"{kafka.prefix}nowhere{number}", None, b"")) for number in range(50)]
    send_all(outbox, messages(topic, 1, start=1))
    send_all(outbox, messages(kafka.topic("other"), 1))
    assert not any(future.done() for future in unknown)
    monkeypatch.setattr(workers.bus.topics, "APPEARANCE_S", 0.0)
    refusals = [future.exception(LIMIT_S) for future in unknown]

    assert {type(error) for error in refusals} == {TopicRefused}
    assert str(refusals[0]) == f"the topic {kafka.prefix}nowhere0 does not exist"
    eventually(lambda: not any("nowhere" in name for name in outbox._producer._metadata._topics))


def test_a_refused_topic_is_refused_at_once_and_asked_about_again_later(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.topics, "REFUSED_S", 2.0)  # of which the next send needs a moment
    outbox = kafka.outbox()
    unknown = Outgoing(kafka.prefix + "late", None, b"")
    assert isinstance(outbox.send(unknown).exception(LIMIT_S), TopicRefused)

    at_once = outbox.send(unknown)
    assert at_once.done()
    kafka.topic("late")

    assert isinstance(at_once.exception(), TopicRefused)
    eventually(lambda: outbox.send(unknown).exception(LIMIT_S) is None)


def test_a_topic_that_appears_in_time_gets_its_messages_in_order(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.topics, "APPEARANCE_S", LIMIT_S)
    outbox = kafka.outbox()
    sent = messages(kafka.prefix + "soon", 20)

    futures = [outbox.send(message) for message in sent[:10]]
    topic = kafka.topic("soon")
    futures += [outbox.send(message) for message in sent[10:]]

    assert [future.exception(LIMIT_S) for future in futures] == [None] * 20
    assert values(take(kafka.inbox(topic), 20)) == [message.value for message in sent]


def test_while_the_broker_is_away_an_unknown_topic_is_not_refused(server, kafka):
    outbox, (transactions, offsets) = kafka.outbox(), transactions_of(kafka)
    unknown = Outgoing(kafka.prefix + "nowhere", None, b"")

    server.freeze()
    try:
        eventually(lambda: psutil.Process(server.pid).status() == psutil.STATUS_STOPPED)
        with ThreadPoolExecutor(1) as executor:
            publishing = executor.submit(transactions.publish, [unknown], offsets)
            assert isinstance(outbox.send(unknown).exception(LIMIT_S), Transient)
            assert isinstance(publishing.exception(LIMIT_S), Transient)
    finally:
        server.thaw()


def test_messages_that_wait_for_their_topic_fail_when_the_outbox_is_closed(kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.topics, "APPEARANCE_S", LIMIT_S)
    outbox = kafka.outbox()
    waiting = outbox.send(Outgoing(kafka.prefix + "nowhere", None, b""))

    outbox.close(5.0)

    assert isinstance(waiting.exception(0), Transient)


@pytest.mark.parametrize("allowed", [ACLOperation.DESCRIBE, ACLOperation.ALTER], ids=["visible", "hidden"])
def test_a_topic_that_is_closed_to_the_worker_refuses_its_messages_and_no_others(kafka, allowed):
    topic, closed = kafka.topic("out"), kafka.topic("closed")
    allow_only(kafka, closed, allowed)
    outbox = kafka.outbox()

    futures = [outbox.send(Outgoing(name, b"key", b"")) for name in (topic, closed, topic, closed)]
    outcomes = [type(future.exception(LIMIT_S)) for future in futures]

    assert outcomes == [type(None), TopicRefused] * 2
    assert outbox.send(Outgoing(closed, None, b"")).done()


def test_a_transaction_names_the_message_whose_topic_does_not_exist_and_publishes_nothing(kafka):
    transactions, offsets = transactions_of(kafka)
    replies = kafka.topic("out")
    unknown = Outgoing(kafka.prefix + "nowhere", b"key", b"")

    with pytest.raises(TopicRefused, match="does not exist") as refused:
        transactions.publish([*messages(replies, 2), unknown, *messages(replies, 1, start=2)], offsets)
    transactions.publish(messages(replies, 1, start=9), offsets)

    assert refused.value.message_number == 2
    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"9"]


@pytest.mark.parametrize("number_before", [0, 3, 900])
def test_a_transaction_names_the_message_whose_topic_is_closed_and_publishes_nothing(kafka, number_before):
    transactions, offsets = transactions_of(kafka)
    replies, closed = kafka.topic("out"), kafka.topic("closed")
    allow_only(kafka, closed, ACLOperation.DESCRIBE)
    refused_message = Outgoing(closed, b"key", b"")
    batch = [*messages(replies, number_before), refused_message, *messages(replies, number_before)]

    for _ in range(2):  # the second time it is known without asking
        with pytest.raises(TopicRefused, match="AUTHORIZATION") as refused:
            transactions.publish(batch, offsets)
        assert refused.value.message_number == number_before
    transactions.publish(messages(replies, 1, start=1000), offsets)

    assert values(take(kafka.inbox(replies, group="readers"), 1)) == [b"1000"]


def test_the_other_requests_of_a_transaction_are_answered(kafka):
    topic, replies, closed = kafka.topic("in"), kafka.topic("out"), kafka.topic("closed")
    allow_only(kafka, closed, ACLOperation.DESCRIBE)
    send_all(kafka.outbox(), messages(topic, 6))
    inbox = kafka.inbox(topic)
    records = take(inbox, 6)
    wanted = {1: kafka.prefix + "nowhere", 2: closed, 4: kafka.prefix + "nowhere", 5: kafka.prefix + "no-such"}

    with ThreadPoolExecutor(1) as executor:
        outbox = kafka.transactional_outbox(inbox)
        delivery = ExactlyOnce(
            outbox,
            executor,
            Partitions(inbox, lambda: None),
            lambda: None,
            0.0,
            Counted(),
            BusSpans.off(),
            UndeliveredLimits(),
        )
        for number, record in enumerate(records):
            delivery.begin(record)
            reply = Outgoing(
                wanted.get(number, replies),
                b"key",
                record.value,
                if_refused=lambda refused, record=record: Outgoing(replies, b"key", b"instead of " + record.value),
            )
            delivery.finish(Finished(record, (reply,)), 0.0)

        def all_published() -> bool:
            delivery.turn(time.monotonic())
            return delivery.settled()

        eventually(all_published)
        inbox.close(5.0)

    expected = [b"instead of %d" % number if number in wanted else b"%d" % number for number in range(6)]
    assert values(take(kafka.inbox(replies, group="readers"), 6)) == expected


def test_headers_that_other_clients_may_write_are_read(kafka):
    topic = kafka.topic("in")
    reader = KafkaReader(kafka.connection, [topic])
    headers = [(Latin("größe"), b"1"), ("null", None), ("traceparent", b"t"), (Latin("é"), None)]
    write(kafka, topic, headers)
    send_all(kafka.outbox(), messages(topic, 1, start=2))

    before, odd, after = take(kafka.inbox(topic), 3)
    read = []
    eventually(lambda: read.extend(reader.poll(0.5)) or len(read) == 3)
    reader.close()

    assert (before.value, odd.value, after.value) == (b"0", b"1", b"2")
    assert odd.headers == (("gr\ufffd\ufffde", b"1"), ("null", b""), ("traceparent", b"t"), ("\ufffd", b""))
    assert [record.headers for record in read] == [before.headers, odd.headers, after.headers]


def check(kafka: KafkaBus, *, reads=(), writes=(), group: str = "group") -> None:
    """Try what a worker needs, again while the brokers are not ready."""

    def attempt() -> bool:
        try:
            check_access(kafka.connection, reads=reads, writes=writes, group_id=kafka.prefix + group)
        except Transient:
            return False
        return True

    eventually(attempt)


def test_a_worker_that_may_use_its_topics_and_its_group_passes(kafka):
    check(kafka, reads=[kafka.topic("in")], writes=[kafka.topic("out")])


def test_a_missing_topic_is_named_before_the_worker_is_ready(kafka):
    with pytest.raises(Misconfigured, match=f"the topic {kafka.prefix}nowhere does not exist: create it"):
        check(kafka, reads=[kafka.topic("in")], writes=[kafka.prefix + "nowhere"])


@pytest.mark.parametrize(
    ("allowed", "sentence"),
    [
        (ACLOperation.DESCRIBE, "it may not READ the topic"),
        (ACLOperation.ALTER_CONFIGS, "it may not describe the topic"),
    ],
)
def test_a_missing_permission_to_read_is_named_before_the_worker_is_ready(kafka, allowed, sentence):
    topic = kafka.topic("in")
    allow_only(kafka, topic, allowed)

    with pytest.raises(Misconfigured, match=sentence):
        check(kafka, reads=[topic])


def test_a_missing_permission_to_write_is_named_before_the_worker_is_ready(kafka):
    topic = kafka.topic("out")
    allow_only(kafka, topic, ACLOperation.READ)

    with pytest.raises(Misconfigured, match=f"it may not WRITE the topic {topic}"):
        check(kafka, reads=[kafka.topic("in")], writes=[topic])


def test_a_group_that_belongs_to_others_is_named_before_the_worker_is_ready(kafka):
    pattern = ResourcePattern(ResourceType.GROUP, kafka.prefix + "theirs")
    with contextlib.closing(KafkaAdminClient(**kafka.connection)) as admin:
        admin.create_acls([ACL("User:other", "*", ACLOperation.READ, ACLPermissionType.ALLOW, pattern)])

    with pytest.raises(Misconfigured, match="it may not READ the group"):
        check(kafka, reads=[kafka.topic("in")], group="theirs")


def test_a_partition_that_a_reply_names_and_the_topic_does_not_have_refuses_that_reply_alone(kafka):
    topic = kafka.topic("out")
    outbox, (transactions, offsets) = kafka.outbox(), transactions_of(kafka)
    wrong = Outgoing(topic, b"key", b"", partition=7)

    assert isinstance(outbox.send(wrong).exception(LIMIT_S), TopicRefused)
    with pytest.raises(TopicRefused) as refused:
        transactions.publish([*messages(topic, 1), wrong], offsets)

    assert refused.value.message_number == 1
    send_all(outbox, messages(topic, 1, start=5))
    assert values(take(kafka.inbox(topic, group="readers"), 1)) == [b"5"]


def test_a_dead_letter_with_neither_key_nor_value_is_published(kafka):
    topic = kafka.topic("dlq")

    send_all(kafka.outbox(), [Outgoing(topic, None, None, (("dead-letter-topic", b"in"),))])

    (letter,) = take(kafka.inbox(topic), 1)
    assert (letter.value, letter.headers) == (None, (("dead-letter-topic", b"in"),))

"""What the bus does while a real Kafka is frozen, killed, or refuses the credentials."""

from __future__ import annotations

import gc
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

import workers.bus.consumer
from bus_harness import LIMIT_S, KafkaBus, eventually, messages, send_all, take, take_until, values
from server_process import free_port
from services import KafkaServer
from workers.bus.consumer import KafkaInbox
from workers.bus.producer import KafkaOutbox
from workers.errors import Misconfigured, Transient
from workers.ports import Commit, Partition

pytestmark = [
    pytest.mark.services,
    # kafka-python leaves the socket of a connection that was refused or lost to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

SASL_PORT = free_port()
CREDENTIALS = {
    "bootstrap_servers": [f"127.0.0.1:{SASL_PORT}"],
    "security_protocol": "SASL_PLAINTEXT",
    "sasl_mechanism": "PLAIN",
    "sasl_plain_username": "worker",
    "sasl_plain_password": "right",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for all of these tests: each leaves it running."""
    made = KafkaServer(tmp_path_factory.mktemp("kafka") / "kafka", {"auto.create.topics.enable": "false"})
    made.settings |= {
        "listeners": f"PLAINTEXT://{made.brokers},SASL_PLAINTEXT://127.0.0.1:{SASL_PORT},"
        f"CONTROLLER://127.0.0.1:{made._controller_port}",
        "advertised.listeners": f"PLAINTEXT://{made.brokers},SASL_PLAINTEXT://127.0.0.1:{SASL_PORT}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.sasl_plaintext.plain.sasl.jaas.config": "org.apache.kafka.common.security.plain."
        'PlainLoginModule required user_worker="right";',
    }
    made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _collected():
    logger = logging.getLogger("kafka")
    logger.setLevel(logging.CRITICAL)  # captured log records would keep those sockets beyond their test
    yield
    logger.setLevel(logging.NOTSET)
    gc.collect()


@pytest.fixture
def kafka(server, unique_prefix):
    made = KafkaBus(server.brokers, unique_prefix)
    yield made
    made.close()


def freeze(server) -> None:
    server.freeze()
    eventually(lambda: psutil.Process(server.pid).status() == psutil.STATUS_STOPPED)


def inbox_with(connection) -> KafkaInbox:
    return KafkaInbox(
        connection,
        topic="in",
        group_id="group",
        wake=lambda: None,
        read_committed=True,
        max_poll_records=10,
        max_message_bytes=1000,
    )


@pytest.mark.parametrize(
    "wrong",
    [{"sasl_plain_password": "wrong"}, {"sasl_mechanism": "SCRAM-SHA-256"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_credentials_that_are_refused_are_a_misconfiguration_at_the_start(server, wrong):
    with pytest.raises(Misconfigured, match="Kafka refuses this worker"):
        inbox_with(CREDENTIALS | wrong)
    with pytest.raises(Misconfigured, match="Kafka refuses this worker"):
        KafkaOutbox(CREDENTIALS | wrong, max_message_bytes=1000)


def test_right_credentials_are_accepted(server):
    inbox = inbox_with(CREDENTIALS)
    outbox = KafkaOutbox(CREDENTIALS, max_message_bytes=1000)

    outbox.close(5.0)
    inbox.close(5.0)


def test_a_start_without_a_broker_is_transient():
    connection = {"bootstrap_servers": [f"127.0.0.1:{free_port()}"], "bootstrap_timeout_ms": 200}

    with pytest.raises(Transient):
        inbox_with(connection)
    with pytest.raises(Transient):
        KafkaOutbox(connection, max_message_bytes=1000)


def test_a_frozen_broker_delays_everything_and_loses_nothing(server, kafka, monkeypatch):
    monkeypatch.setattr(workers.bus.consumer, "COMMIT_TIMEOUT_S", 0.5)
    topic = kafka.topic("in")
    outbox, inbox = kafka.outbox(), kafka.inbox(topic)
    send_all(outbox, messages(topic, 3))
    take(inbox, 3)

    freeze(server)
    try:
        sent = [outbox.send(message) for message in messages(topic, 2, start=3)]
        commit = inbox.commit({Partition(topic, 0): Commit(3)})
        assert isinstance(commit.exception(LIMIT_S), Transient)
        assert inbox.take() is None
        assert [future.exception() for future in sent if future.done()] == []
    finally:
        server.thaw()

    assert [future.exception(LIMIT_S) for future in sent] == [None, None]
    take_until(inbox, {b"3", b"4"})
    eventually(lambda: inbox.commit({Partition(topic, 0): Commit(5)}).exception(LIMIT_S) is None)


def test_a_member_of_a_frozen_broker_closes_within_its_time(server, kafka):
    topic = kafka.topic("in")
    inbox, outbox = kafka.inbox(topic), kafka.outbox()
    send_all(outbox, messages(topic, 1))
    take(inbox, 1)

    freeze(server)
    try:
        outbox.send(messages(topic, 1)[0])
        commit = inbox.commit({Partition(topic, 0): Commit(1)})
        started = time.monotonic()
        inbox.close(1.0)
        outbox.close(1.0)
        closed_s = time.monotonic() - started
    finally:
        server.thaw()

    assert closed_s < 4.0
    assert commit.exception(LIMIT_S) is not None


def test_a_transaction_that_waits_for_the_broker_ends_with_the_worker(server, kafka):
    topic, replies = kafka.topic("in"), kafka.topic("out")
    inbox = kafka.inbox(topic)
    eventually(inbox.assigned)
    transactions = kafka.transactional_outbox(inbox)

    freeze(server)
    try:
        with ThreadPoolExecutor(1) as executor:
            publishing = executor.submit(transactions.publish, messages(replies, 1), {Partition(topic, 0): Commit(0)})
            transactions.close(0.5)

            assert isinstance(publishing.exception(LIMIT_S), Transient)
    finally:
        server.thaw()


def test_a_killed_broker_comes_back_to_workers_that_go_on(server, kafka):
    topic, replies = kafka.topic("in"), kafka.topic("out")
    outbox, inbox = kafka.outbox(), kafka.inbox(topic)
    transactions = kafka.transactional_outbox(inbox)
    send_all(outbox, messages(topic, 3))
    take(inbox, 3)
    transactions.publish(messages(replies, 1), {Partition(topic, 0): Commit(1)})

    server.kill()
    sent = [outbox.send(message) for message in messages(topic, 2, start=3)]
    server.start()

    assert [future.exception(LIMIT_S) for future in sent] == [None, None]
    take_until(inbox, {b"3", b"4"})
    attempts = []

    def published():
        try:
            transactions.publish(messages(replies, 1, start=1), {Partition(topic, 0): Commit(5)})
        except Transient as error:
            attempts.append(error)
            return False
        return True

    eventually(published)
    inbox.close(5.0)
    assert values(take(kafka.inbox(replies, group="readers"), 2)) == [b"0", b"1"]
    send_all(outbox, messages(topic, 1, start=5))
    assert values(take(kafka.inbox(topic), 1)) == [b"5"]

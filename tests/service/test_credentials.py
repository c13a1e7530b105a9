"""Refused credentials: the worker stays, is not ready, and reports which service refuses it and why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from server_process import ServiceError, free_port
from service_harness import Service
from service_worker import BUS, eventually, waits_for
from services import KafkaServer
from skipping import missing

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services


def test_a_wrong_password_of_the_store_is_reported_and_waited_for(
    make_service: Callable[..., Service], kafka_brokers: str, private_redis
):
    redis = private_redis({"requirepass": "right"})
    service = make_service(kafka_brokers, f"redis://:wr0ng@127.0.0.1:{redis.port}")
    worker = service.start("rerank")

    eventually(lambda: waits_for(worker, "store answers", *BUS, why="check the user, the password"), "it is said")
    assert "wr0ng" not in worker.get("/readyz")[1] + worker.log.read_text()
    assert worker.get("/livez")[0] == 200
    with contextlib.closing(Redis(port=redis.port, password="right")) as admin:
        admin.config_set("requirepass", "wr0ng")

    worker.wait_ready()
    assert worker.stop() == 0


@pytest.fixture
def guarded_kafka(tmp_path: Path) -> Iterator[tuple[KafkaServer, str]]:
    """A broker, and its address that requires a password."""
    server, guarded = KafkaServer(tmp_path / "kafka"), f"127.0.0.1:{free_port()}"
    server.settings |= {
        "listeners": f"PLAINTEXT://{server.brokers},SASL_PLAINTEXT://{guarded},"
        f"CONTROLLER://127.0.0.1:{server._controller_port}",
        "advertised.listeners": f"PLAINTEXT://{server.brokers},SASL_PLAINTEXT://{guarded}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.sasl_plaintext.plain.sasl.jaas.config": "org.apache.kafka.common.security.plain."
        'PlainLoginModule required user_worker="right";',
    }
    try:
        server.start()
    except ServiceError as error:
        missing(str(error))
    yield server, guarded
    server.stop()


def test_a_wrong_password_of_the_broker_is_reported_and_not_shown(
    make_service: Callable[..., Service], guarded_kafka: tuple[KafkaServer, str], redis_url: str
):
    server, guarded = guarded_kafka
    service = make_service(server.brokers, redis_url)
    service.variables |= {
        "KAFKA_BROKERS": guarded,
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_MECHANISM": "PLAIN",
        "KAFKA_SASL_USERNAME": "worker",
        "KAFKA_SASL_PASSWORD": "not-the-one",
    }
    worker = service.start("rerank")

    eventually(lambda: waits_for(worker, *BUS, why="Kafka refuses this worker"), "it is said")
    assert "not-the-one" not in worker.get("/readyz")[1] + worker.log.read_text()
    assert worker.get("/livez")[0] == 200
    worker.terminate()
    assert worker.wait(30) == 0

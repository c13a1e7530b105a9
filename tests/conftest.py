"""Starts real services for the tests that use them, once for all pytest-xdist workers.

The controlling process owns the servers; a worker requests an address over a local socket, and only then
is the server started. Without pytest-xdist the single process is also the controller.
"""

from __future__ import annotations

import json
import shutil
import socket
import socketserver
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services import KafkaServer, PostgresServer, RedisServer, ServiceError, Services
from skipping import missing

#: Fixtures of the tests that need a GPU.
pytest_plugins = ["gpu_devices"]

ADDRESS_LIMIT_S = 300.0  # a first run downloads Kafka

#: The attribute of `Services` that holds each service's address.
ADDRESSES = {"kafka": "brokers", "redis": "redis_url", "postgres": "database_url"}
DESK = pytest.StashKey["ServicesDesk"]()


class ServicesDesk:
    """Answers each worker's request with an address, or with the reason why the service cannot start."""

    def __init__(self) -> None:
        self.services = Services().__enter__()
        self.server = socketserver.TCPServer(("127.0.0.1", 0), self.answer_one)
        self.thread = threading.Thread(target=self.server.serve_forever, name="services-desk")
        self.thread.start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    def answer_one(self, connection: socket.socket, *_: object) -> None:
        service = connection.recv(100).decode()
        try:
            answer = {"address": getattr(self.services, ADDRESSES[service])}
        except ServiceError as error:
            answer = {"error": str(error)}
        connection.sendall(json.dumps(answer).encode())

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.services.__exit__(None, None, None)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.stash[DESK] = ServicesDesk()


#: Fixtures that start a server; a test that uses one of them is marked `services`.
SERVER_FIXTURES = {
    "kafka_brokers",
    "redis_url",
    "database_url",
    "private_kafka",
    "private_redis",
    "private_postgres",
}


@pytest.hookimpl(tryfirst=True)  # before pytest itself deselects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SERVER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.services)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.workerinput["services_desk_port"] = node.config.stash[DESK].port


def pytest_unconfigure(config: pytest.Config) -> None:
    if DESK in config.stash:
        config.stash[DESK].close()


def address_of(service: str, config: pytest.Config) -> str:
    workerinput = getattr(config, "workerinput", None)
    port = workerinput["services_desk_port"] if workerinput else config.stash[DESK].port
    with socket.create_connection(("127.0.0.1", port), timeout=ADDRESS_LIMIT_S) as connection:
        connection.sendall(service.encode())
        with connection.makefile("rb") as reader:
            answer = json.load(reader)
    if "error" in answer:
        missing(f"no {service}: {answer['error']}")
    return answer["address"]


@pytest.fixture(scope="session")
def kafka_brokers(pytestconfig: pytest.Config) -> str:
    """Addresses of a real Kafka that all tests share; names of topics and groups begin with `unique_prefix`."""
    return address_of("kafka", pytestconfig)


@pytest.fixture(scope="session")
def redis_url(pytestconfig: pytest.Config) -> str:
    """URL of a real Redis that all tests share; keys begin with `unique_prefix`."""
    return address_of("redis", pytestconfig)


@pytest.fixture(scope="session")
def database_url(pytestconfig: pytest.Config) -> str:
    """URL of a real PostgreSQL that all tests share; use model digests or schemas that no other test has."""
    return address_of("postgres", pytestconfig)


@pytest.fixture
def unique_prefix() -> str:
    """A prefix for topics, groups, ids and keys that no other test has, now or in an earlier run."""
    return f"t{uuid.uuid4().hex[:12]}."


@pytest.fixture
def private_kafka(tmp_path: Path) -> Iterator[Callable[..., KafkaServer]]:
    """Return a function that starts a Kafka for this test, which may be killed or frozen; takes server settings."""
    yield from private_servers(KafkaServer, tmp_path)


@pytest.fixture
def private_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Return a function that starts a Redis for this test, which may be killed or frozen; takes server settings."""
    yield from private_servers(RedisServer, tmp_path)


@pytest.fixture
def private_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """Return a function that starts a PostgreSQL for this test, which may be killed or frozen; takes parameters."""
    # Not in tmp_path: another pytest session that starts removes the access of other users to all of pytest's folders,
    # and root runs this server as another user.
    with tempfile.TemporaryDirectory(prefix="edje-postgres-") as folder:
        yield from private_servers(PostgresServer, Path(folder))


def private_servers(kind, folder: Path):
    started = []

    def start(settings=None):
        server = kind(folder / f"{kind.name}-{len(started)}", settings)
        started.append(server)
        try:
            server.start()
        except ServiceError as error:
            missing(str(error))
        return server

    yield start
    for server in started:
        server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)

"""Fixtures of the end-to-end tests; each module asks for them with `pytest_plugins`.

The logs of a test's workers are printed when it ends, which pytest shows where it has failed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server_process import tail
from service_harness import Checkpoint, Service


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.make(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def make_service(
    checkpoint: Checkpoint,
    unique_prefix: str,
    tmp_path: Path,
    private_kafka: object,  # asked for so that the clients are closed before their servers
    private_redis: object,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Callable[..., Service]]:
    """A service on the given brokers and Redis, with topics of its own."""
    made: list[Service] = []

    def make(brokers: str, redis_url: str, **topic_settings: object) -> Service:
        service = Service(
            brokers, redis_url, f"{unique_prefix}{len(made)}.", checkpoint, tmp_path / f"logs-{len(made)}"
        )
        made.append(service)
        service.create_topics(**topic_settings)
        return service

    yield make
    for service in made:
        service.close()
        for worker in service.workers:
            print(f"--- the end of {worker.log.name}\n{tail(worker.log)}")
    # What kafka-python leaves unclosed is to be complained about here, or not, as this test says, and in no later one;
    # its log records hold connections.
    caplog.get_records("call").clear()
    gc.collect()


@pytest.fixture
def service(make_service: Callable[..., Service], kafka_brokers: str, redis_url: str) -> Service:
    """A service on the servers that all tests share."""
    return make_service(kafka_brokers, redis_url)

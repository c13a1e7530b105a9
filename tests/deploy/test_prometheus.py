"""A real Prometheus that scrapes every kind of worker at work: each query is valid and each panel shows a number."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy_manifests import ROOT
from deploy_queries import dashboard_queries, queries
from edje.checkpoint import read_config, read_digest
from prometheus_harness import Prometheus
from protocols.blob import BlobLayout
from server_process import free_port
from service_harness import SMALL_GIF, Checkpoint, Service
from service_worker import Worker, eventually

pytest_plugins = ["service_fixtures"]
pytestmark = [pytest.mark.kubernetes, pytest.mark.services, pytest.mark.timeout(600)]

#: The shipped model: the gateway and the index worker need a first stage.
SCENES = ROOT / "deploy" / "models" / "scenes"


@dataclass
class Busy:
    """The workers, their scraper and the gateway's address."""

    service: Service
    prometheus: Prometheus
    gateway: str

    def post(self, path: str, body: Any) -> int:
        """Make one request to the gateway; returns the status."""
        request = urllib.request.Request(self.gateway + path, json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def work(self, number: int) -> None:
        """Give every worker one round of work, with valid and invalid input."""
        service = self.service
        service.ask(f"ok-{number}", ["dog", "cat"])
        service.ask(f"partial-{number}", ["dog", "none"])
        service.publish(service.topics.rerank_requests, b"no request", f"bad-{number}")
        service.announce(f"point-{number}", data=SMALL_GIF)
        service.flush()
        assert self.post("/v1/search", {"query": "a dog"}) == 200
        # No worker answers within a millisecond, so the answer is in the given order.
        assert self.post("/v2/rerank", {"query": "a dog", "documents": ["dog"], "timeout_ms": 1}) == 200
        assert self.post("/v2/rerank", {"documents": ["dog"]}) == 422


def config_of_compose(workers: dict[str, Worker]) -> dict[str, Any]:
    """The configuration of compose.yaml, with the addresses of `workers` and a short scrape interval."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    for target in config["scrape_configs"][0]["static_configs"]:
        target["targets"] = [f"127.0.0.1:{workers[target['labels']['worker']].port}"]
    return config


@pytest.fixture
def busy(make_service, kafka_brokers, redis_url, private_postgres, tmp_path: Path) -> Iterator[Busy]:
    """Every kind of worker, scraped once a second."""
    service = make_service(kafka_brokers, redis_url)
    shape = read_config(SCENES)
    layout = BlobLayout(read_digest(SCENES), shape.adapter.num_tokens, shape.joint.dim, "int8")
    service.checkpoint = Checkpoint(SCENES, layout)
    service.variables["DATABASE_URL"] = private_postgres().url
    service.store_images(["dog", "cat"])
    port = free_port()
    workers = {
        "rerank": service.start("rerank"),
        # The constant engine makes no embeddings, which the index worker writes.
        "ingest": service.start("ingest", engine="torch", num_threads=1, publish_embedding=True, thumbnails=True),
        "index": service.start_plain("index", checkpoint=SCENES, group_id=f"{service.topics.prefix}index"),
        "gateway": service.start_plain("gateway", checkpoint=SCENES, port=port),
    }
    for worker in workers.values():
        worker.wait_ready()
    server = Prometheus(tmp_path / "prometheus", lambda: config_of_compose(workers))
    server.start()
    yield Busy(service, server, f"http://127.0.0.1:{port}")
    server.stop()


def numbers(samples: list[dict[str, Any]]) -> list[float]:
    return [float(sample["value"][1]) for sample in samples]


def test_every_query_is_valid_and_every_panel_shows_a_number(busy: Busy):
    query = busy.prometheus.query
    rounds = 0

    def all_panels_have_numbers() -> bool:
        nonlocal rounds
        busy.work(rounds)
        rounds += 1
        answers = {name: numbers(query(expression)) for name, expression in dashboard_queries()}
        # NaN, the only value that differs from itself, is a panel without data.
        empty = [name for name, values in answers.items() if not any(value == value for value in values)]
        print(f"round {rounds}: no data in {empty}")
        return not empty

    eventually(all_panels_have_numbers, "every panel shows a number", 120)
    for expression in queries().values():
        query(expression)

    assert numbers(query('sum(edje_replies_total{status="ok"})')) > [0]
    assert numbers(query('sum(edje_dead_letters_total{worker="rerank"})')) > [0]
    assert numbers(query("sum(edje_gateway_degraded_total)")) > [0]
    assert numbers(query("sum(edje_gateway_refused_total)")) > [0]
    assert {sample["metric"]["worker"] for sample in query("up == 1")} == {"rerank", "ingest", "index", "gateway"}

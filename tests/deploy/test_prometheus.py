"""A real Prometheus that scrapes real workers at work: every query is understood, and the dashboard shows something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy_manifests import ROOT
from deploy_queries import dashboard_queries, queries
from prometheus_harness import Prometheus
from service_harness import SMALL_GIF, Service
from service_worker import Worker, eventually

pytest_plugins = ["service_fixtures"]
pytestmark = [pytest.mark.kubernetes, pytest.mark.services, pytest.mark.timeout(600)]


def config_of_compose(workers: dict[str, Worker]) -> dict[str, Any]:
    """The configuration of compose.yaml, but for where the workers are and how often they are asked."""
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    for target in config["scrape_configs"][0]["static_configs"]:
        target["targets"] = [f"127.0.0.1:{workers[target['labels']['worker']].port}"]
    return config


@pytest.fixture
def busy(service: Service, tmp_path: Path) -> Iterator[tuple[Service, Prometheus]]:
    """Both workers with a little of everything to do, scraped."""
    service.store_images(["dog", "cat"])
    workers = {"rerank": service.rerank(), "ingest": service.ingest()}
    server = Prometheus(tmp_path / "prometheus", lambda: config_of_compose(workers))
    server.start()
    yield service, server
    server.stop()


def work(service: Service, number: int) -> None:
    service.ask(f"ok-{number}", ["dog", "cat"])
    service.ask(f"partial-{number}", ["dog", "none"])
    service.publish(service.topics.rerank_requests, b"no request", f"bad-{number}")
    service.announce(f"point-{number}", data=SMALL_GIF)
    service.flush()


def numbers(samples: list[dict[str, Any]]) -> list[float]:
    return [float(sample["value"][1]) for sample in samples]


def test_every_query_is_understood_and_every_panel_shows_a_number(busy):
    service, server = busy
    rounds = 0

    def shown() -> bool:
        nonlocal rounds
        work(service, rounds)
        rounds += 1
        answers = {name: numbers(server.query(query)) for name, query in dashboard_queries()}
        dark = [
            name for name, values in answers.items() if not any(value == value for value in values)
        ]  # NaN is nothing
        print(f"round {rounds}: nothing yet in {dark}")
        return not dark

    eventually(shown, "every panel shows something", 120)
    for query in queries().values():
        server.query(query)

    assert numbers(server.query('sum(edje_replies_total{status="ok"})')) > [0]
    assert numbers(server.query('sum(edje_dead_letters_total{worker="rerank"})')) > [0]
    assert {sample["metric"]["worker"] for sample in server.query("up == 1")} == {"rerank", "ingest"}

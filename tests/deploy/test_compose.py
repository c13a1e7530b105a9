"""compose.yaml without a container engine: its mounts, build stages and dependencies exist."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import yaml

from deploy_manifests import ROOT, compose

SERVICES = compose()
#: Files that name other services by their addresses.
CONFIGURATIONS = (
    "deploy/kubernetes/overlays/local/connections.env",
    "deploy/kafka/one-node.env",
    "deploy/collector/collector.yaml",
    "deploy/prometheus/prometheus.yml",
    "deploy/grafana/datasources.yaml",
    "compose.yaml",
)


def mounts(service: str) -> Iterator[tuple[str, str]]:
    for mount in SERVICES[service].get("volumes", ()):
        source, target = mount.split(":")[:2]
        yield source, target


@pytest.mark.parametrize("service", SERVICES)
def test_the_mounts_build_stage_and_dependencies_of_a_service_exist(service: str):
    described = SERVICES[service]
    volumes = yaml.safe_load((ROOT / "compose.yaml").read_text())["volumes"]
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)

    for source, _ in mounts(service):
        assert (ROOT / source).exists() if source.startswith(".") else source in volumes
    assert set(described.get("depends_on", ())) <= SERVICES.keys()
    if "build" in described:
        assert described["build"]["target"] in stages


@pytest.mark.parametrize("path", CONFIGURATIONS)
def test_an_address_names_a_service(path: str):
    hosts = re.findall(r"(?:://|[=\[ \"])([a-z]+):\d{4,5}\b", (ROOT / path).read_text())

    assert set(hosts) - {"localhost"} <= SERVICES.keys()
    assert hosts


def test_nothing_is_open_to_other_machines():
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_dashboard_that_grafana_reads_is_the_one_of_the_cluster():
    (folder,) = [
        provider["options"]["path"]
        for provider in yaml.safe_load((ROOT / "deploy" / "grafana" / "dashboards.yaml").read_text())["providers"]
    ]

    assert ("./deploy/kubernetes/monitoring/dashboard.json", f"{folder}/edje.json") in list(mounts("grafana"))

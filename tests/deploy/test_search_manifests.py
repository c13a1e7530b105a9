"""Index worker and gateway as deployed: settings, ports, partitions and network access."""

from __future__ import annotations

import os
import shlex
import tomllib

import opentelemetry.sdk.environment_variables as opentelemetry_variables
import pytest

from demo_workers import parse_procfile
from deploy_manifests import (
    OVERLAYS,
    ROOT,
    compose,
    compose_environment,
    container_of,
    environment_of,
    of_kind,
    rendered,
)
from workers.gateway.replica import CLOSE_S
from workers.gateway.settings import GatewaySettings
from workers.index.settings import IndexSettings
from workers.read_settings import read_settings, variable_names
from workers.settings import ServiceSettings

KINDS: dict[str, type[ServiceSettings]] = {"index": IndexSettings, "gateway": GatewaySettings}
PLACES = ("compose", *OVERLAYS)
PREFIXES = ("INDEX_", "GATEWAY_", "KAFKA_", "REDIS_", "DATABASE_", "OTEL_")


def variables_of(place: str, worker: str) -> dict[str, str]:
    return compose_environment(compose()[worker]) if place == "compose" else environment_of(rendered(place), worker)


def settings_in(place: str, worker: str, monkeypatch: pytest.MonkeyPatch) -> ServiceSettings:
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    for name, value in variables_of(place, worker).items():
        monkeypatch.setenv(name, value)
    return read_settings(KINDS[worker])


@pytest.mark.parametrize("worker", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_every_variable_is_known_and_every_value_valid(place: str, worker: str, monkeypatch):
    known = {*variable_names(KINDS[worker]).values(), *vars(opentelemetry_variables), "OMP_NUM_THREADS"}
    foreign = {"REDIS_URL"} if place == "compose" else set()  # shared by all services of compose.yaml

    assert sorted(variables_of(place, worker).keys() - known - foreign) == []
    settings = settings_in(place, worker, monkeypatch)
    assert (settings.http_host, settings.log_format) == ("0.0.0.0", "json")
    assert settings.database_url != KINDS[worker].model_fields["database_url"].default


@pytest.mark.parametrize("worker", KINDS)
def test_procfile_compose_and_cluster_run_the_same_command(worker: str):
    commands = {shlex.join(container_of(rendered(overlay), worker)["command"]) for overlay in OVERLAYS}
    commands.add(shlex.join(compose()[worker]["command"]))
    commands.add(shlex.join(parse_procfile((ROOT / "Procfile").read_text())[worker]))

    assert commands == {f"python -m workers.{worker}"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_are_where_the_settings_say(overlay: str, monkeypatch):
    gateway = settings_in(overlay, "gateway", monkeypatch)
    ports = {port["name"]: port["containerPort"] for port in container_of(rendered(overlay), "gateway")["ports"]}
    services = of_kind(rendered(overlay), "Service")

    assert ports == {"http": gateway.http_port, "api": gateway.port}
    assert services["gateway"]["spec"]["ports"][0]["targetPort"] == "api"
    assert of_kind(rendered(overlay), "StatefulSet")["gateway"]["spec"]["serviceName"] in services


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "tensorrt"])
def test_there_is_a_partition_of_replies_for_every_replica(overlay: str):
    topics = tomllib.loads((ROOT / "deploy" / "kafka" / "topics.toml").read_text())["topics"]
    scaler = of_kind(rendered(overlay), "HorizontalPodAutoscaler")["gateway"]["spec"]

    assert scaler["maxReplicas"] <= topics["rerank.responses.gateway"]["partitions"]
    assert "GATEWAY_REPLY_PARTITION" not in environment_of(rendered(overlay), "gateway")


@pytest.mark.parametrize(("host", "partition"), [("gateway-0", 0), ("gateway-15", 15), ("laptop", 0), ("a-12345", 0)])
def test_a_pod_of_a_statefulset_reads_the_partition_of_its_number(host, partition, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: host)

    assert GatewaySettings().own_partition() == partition


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("worker", KINDS)
def test_a_pod_has_longer_to_end_than_its_process_takes(overlay: str, worker: str, monkeypatch):
    settings = settings_in(overlay, worker, monkeypatch)
    makers = of_kind(rendered(overlay), "Deployment") | of_kind(rendered(overlay), "StatefulSet")
    grace_s = makers[worker]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    delay_s = getattr(settings, "drain_delay_s", 0.0)

    assert grace_s >= 1.5 * (delay_s + settings.drain_grace_s + 2 * CLOSE_S)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ingest_publishes_what_the_index_and_the_page_need(overlay: str):
    variables = environment_of(rendered(overlay), "ingest")

    assert variables["INGEST_PUBLISH_EMBEDDING"] == variables["INGEST_THUMBNAILS"] == "true"


def test_only_labelled_namespaces_may_call_the_gateway():
    [policy] = [p for name, p in of_kind(rendered("cpu"), "NetworkPolicy").items() if name == "gateway-clients"]
    [rule] = policy["spec"]["ingress"]

    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"edje-gateway-client": "true"}}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": "api"}]

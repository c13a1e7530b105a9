"""All ways to run the workers use one command for each, and only known variables with valid values."""

from __future__ import annotations

import os
import shlex

import pytest
from opentelemetry.sdk import environment_variables as opentelemetry_variables

from demo_workers import parse_procfile
from deploy_manifests import (
    OVERLAYS,
    ROOT,
    WORKERS,
    compose,
    compose_environment,
    container_of,
    environment_of,
    rendered,
)
from workers.connect import CLOSE_S
from workers.read_settings import read_settings, variable_names
from workers.settings import IngestSettings, RerankSettings, WorkerSettings

KINDS: dict[str, type[WorkerSettings]] = {"ingest": IngestSettings, "rerank": RerankSettings}
PLACES = ("compose", *OVERLAYS)


def command_and_variables(place: str, worker: str) -> tuple[list[str], dict[str, str]]:
    if place == "compose":
        service = compose()[worker]
        return service["command"], compose_environment(service)
    objects = rendered(place)
    return container_of(objects, worker)["command"], environment_of(objects, worker)


def settings_with(variables: dict[str, str], worker: str, monkeypatch: pytest.MonkeyPatch) -> WorkerSettings:
    for name in list(os.environ):
        if name.startswith(("RERANK_", "INGEST_", "KAFKA_", "REDIS_", "OTEL_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return read_settings(KINDS[worker])


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("place", PLACES)
def test_every_variable_is_one_that_the_worker_or_opentelemetry_knows(place: str, worker: str):
    _, variables = command_and_variables(place, worker)

    known = {*variable_names(KINDS[worker]).values(), *vars(opentelemetry_variables)}

    assert sorted(variables.keys() - known) == []


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("place", PLACES)
def test_every_value_is_valid_and_probes_can_reach_the_worker(place: str, worker: str, monkeypatch):
    _, variables = command_and_variables(place, worker)

    settings = settings_with(variables, worker, monkeypatch)

    assert settings.http_host == "0.0.0.0"
    assert settings.log_format == "json"
    assert settings.kafka_brokers != KINDS[worker].model_fields["kafka_brokers"].default
    assert settings.redis_url != KINDS[worker].model_fields["redis_url"].default


@pytest.mark.parametrize("worker", WORKERS)
def test_a_misspelt_variable_and_an_invalid_value_would_be_noticed(worker: str, monkeypatch):
    _, variables = command_and_variables("local", worker)

    with pytest.raises(Exception, match="did you mean"):
        settings_with(variables | {f"{worker.upper()}_HTTP_PROT": "8080"}, worker, monkeypatch)
    monkeypatch.delenv(f"{worker.upper()}_HTTP_PROT")
    with pytest.raises(Exception, match="HTTP_PORT"):
        settings_with(variables | {f"{worker.upper()}_HTTP_PORT": "eighty"}, worker, monkeypatch)


@pytest.mark.parametrize("worker", WORKERS)
def test_procfile_compose_image_and_cluster_run_the_same_command(worker: str):
    commands = {place: command_and_variables(place, worker)[0] for place in PLACES}
    commands["Procfile"] = parse_procfile((ROOT / "Procfile").read_text())[worker]
    for target in (worker, f"{worker}-gpu"):
        commands[f"Dockerfile, {target}"] = image_command(target)

    assert {shlex.join(command) for command in commands.values()} == {f"python -m workers.{worker}"}


def image_command(target: str) -> list[str]:
    (stage,) = [part for part in (ROOT / "Dockerfile").read_text().split("\nFROM ") if f" AS {target}\n" in part]
    (line,) = [line for line in stage.splitlines() if line.startswith("CMD ")]
    return [word.strip(' "') for word in line.removeprefix("CMD").strip(" []").split(",")]


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_and_volumes_are_where_the_settings_say(overlay: str, worker: str, monkeypatch):
    container = container_of(rendered(overlay), worker)

    settings = settings_with(environment_of(rendered(overlay), worker), worker, monkeypatch)

    assert [(port["name"], port["containerPort"]) for port in container["ports"]] == [("http", settings.http_port)]
    assert str(settings.checkpoint) in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_pod_has_longer_to_end_than_its_worker_takes(place: str, worker: str, monkeypatch):
    settings = settings_with(command_and_variables(place, worker)[1], worker, monkeypatch)
    if place == "compose":
        grace_s = float(compose()[worker]["stop_grace_period"].removesuffix("s"))
    else:
        pods = {found["metadata"]["name"]: found for found in rendered(place) if found["kind"] == "Deployment"}
        grace_s = pods[worker]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]

    # The drain, then the consumer and the producer in turn, and half as much again for a slow node.
    assert grace_s >= 1.5 * (settings.drain_grace_s + 2 * CLOSE_S)

"""Reads the Kubernetes overlays and compose.yaml as a platform would."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy_tools import kustomize, run

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("local", "cpu", "gpu", "tensorrt")
WORKERS = ("ingest", "rerank")
#: Content of the Secret that a platform adds; docs/how-to/deploy.md lists its names.
CREDENTIALS = {
    "REDIS_URL": "rediss://edje:secret@redis.example:6380/0",
    "DATABASE_URL": "postgresql://edje:secret@postgres.example:5432/edje",
    "GATEWAY_API_KEYS": "team:" + "0" * 64,
    "KAFKA_SASL_USERNAME": "edje",
    "KAFKA_SASL_PASSWORD": "secret",
}

Object = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> list[Object]:
    """Return every object of an overlay, with defaults, references and hashes filled in."""
    return list(yaml.safe_load_all(run([str(kustomize()), "build", str(KUBERNETES / "overlays" / overlay)])))


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def pod_templates(objects: list[Object]) -> dict[str, Object]:
    """Return the template of every pod of an overlay, by kind and name of its controller."""
    return {
        f"{maker['kind']}/{maker['metadata']['name']}": maker["spec"]["template"]
        for maker in objects
        if maker["kind"] in ("Deployment", "StatefulSet", "Job")
    }


def container_of(objects: list[Object], worker: str) -> Object:
    makers = of_kind(objects, "Deployment") | of_kind(objects, "StatefulSet")
    (container,) = makers[worker]["spec"]["template"]["spec"]["containers"]
    return container


def environment_of(objects: list[Object], worker: str) -> dict[str, str]:
    """Return the variables of a worker's container, with references resolved as the kubelet does."""
    maps = {name: found["data"] for name, found in of_kind(objects, "ConfigMap").items()}
    secrets = {name: found["data"].keys() for name, found in of_kind(objects, "Secret").items()}
    container = container_of(objects, worker)
    variables: dict[str, str] = {}
    for source in container["envFrom"]:
        variables |= maps[source["configMapRef"]["name"]]
    for variable in container["env"]:
        reference = variable["valueFrom"]["secretKeyRef"]
        present = secrets.get(reference["name"], CREDENTIALS.keys())
        if reference["key"] in present:
            variables[variable["name"]] = CREDENTIALS[reference["key"]]
        else:
            assert reference.get("optional"), f"{variable['name']} refers to a missing key"
    return variables


def images(objects: list[Object]) -> Iterator[str]:
    for template in pod_templates(objects).values():
        for container in (*template["spec"].get("initContainers", ()), *template["spec"]["containers"]):
            yield container["image"]


def compose() -> Mapping[str, Object]:
    """The services of compose.yaml."""
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def compose_environment(service: Object) -> dict[str, str]:
    """Return a service's variables as compose reads them: files in order, then the service's own entries."""
    variables: dict[str, str] = {}
    for name in service.get("env_file", ()):
        lines = (ROOT / name).read_text().splitlines()
        variables |= dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return variables | service.get("environment", {})

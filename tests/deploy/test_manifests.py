"""The Kubernetes overlays without a cluster: checked against all schemas, settings and documents they depend on."""

from __future__ import annotations

import copy
import functools
import ipaddress
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import typer.testing
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import trt.build.__main__
from deploy_manifests import (
    KUBERNETES,
    OVERLAYS,
    ROOT,
    WORKERS,
    Object,
    compose,
    environment_of,
    images,
    of_kind,
    pod_templates,
    rendered,
)
from deploy_tools import custom_definitions
from edje.checkpoint import read_digest
from workers.read_settings import read_settings
from workers.settings import IngestSettings, RerankSettings

KUBERNETES_VERSION = "1.36"
GROUPS = {
    kind: model.model_fields["group_id"].default
    for kind, model in (("ingest", IngestSettings), ("rerank", RerankSettings))
}
INPUTS = {"ingest": "images.new", "rerank": "rerank.requests"}


@functools.cache
def custom_schema(api_version: str, kind: str) -> Object | None:
    """Return the schema of a kind that KEDA or the Prometheus operator defines, None for a kind of Kubernetes."""
    for path in custom_definitions():
        # One file for each kind, named after it; reading all of them takes half a minute.
        if not path.name.endswith(f"_{kind.lower()}s.yaml"):
            continue
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            if f"{spec['group']}/{version['name']}" == api_version:
                schema = version["schema"]["openAPIV3Schema"]
                schema["properties"]["metadata"] = {"type": "object"}
                return closed(schema)
    return None


def closed(schema: Any) -> Any:
    """Return the schema without additional fields, which Kubernetes drops silently."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: closed(part) for name, part in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    return (
        schema if free or not isinstance(schema.get("properties"), dict) else schema | {"additionalProperties": False}
    )


def validate(found: Object) -> None:
    custom = custom_schema(found["apiVersion"], found["kind"])
    if custom is not None:
        jsonschema.Draft202012Validator(custom).validate(found)
    else:
        kubernetes_validate.validate(found, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_matches_its_schema(overlay: str):
    for found in rendered(overlay):
        validate(found)


@pytest.mark.parametrize(
    ("kind", "path"),
    [("Deployment", ("spec", "template", "spec")), ("ScaledObject", ("spec",)), ("PodMonitor", ("spec",))],
)
def test_a_field_that_does_not_exist_would_be_noticed(kind: str, path: tuple[str, ...]):
    found = copy.deepcopy(next(each for each in rendered("cpu") if each["kind"] == kind))
    place = functools.reduce(lambda part, name: part[name], path, found)
    place["terminationGracePeriod"] = 60

    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        validate(found)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_configuration_that_a_pod_names_exists(overlay: str):
    objects = rendered(overlay)
    have = of_kind(objects, "ConfigMap").keys() | of_kind(objects, "Secret").keys() | {"credentials"}
    accounts = of_kind(objects, "ServiceAccount").keys() | {None}
    for template in pod_templates(objects).values():
        spec = template["spec"]
        named = (
            {volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume}
            if "volumes" in spec
            else set()
        )
        for container in spec["containers"]:
            named |= {source["configMapRef"]["name"] for source in container.get("envFrom", ())}
            named |= {
                each["valueFrom"]["secretKeyRef"]["name"] for each in container.get("env", ()) if "valueFrom" in each
            }

        assert named <= have
        assert spec.get("serviceAccountName") in accounts


def test_only_the_overlay_without_passwords_brings_a_secret():
    assert [overlay for overlay in OVERLAYS if of_kind(rendered(overlay), "Secret")] == ["local"]


def test_every_image_has_a_version_and_the_projects_own_has_the_projects():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    named = {image for overlay in OVERLAYS for image in images(rendered(overlay))}
    named |= {service["image"] for service in compose().values()} | set(images(rendered("backfill")))

    tags = {image.rpartition(":")[0]: image.rpartition(":")[2] for image in named}

    assert len(tags) == len(named), "one image in two versions"
    assert all(tag and tag != "latest" and any(map(str.isdigit, tag)) for tag in tags.values())
    ours = {name: tag for name, tag in tags.items() if name.startswith("edje-")}
    shipped = read_digest(ROOT / "deploy" / "models" / "scenes")
    assert ours.pop("edje-model") == shipped, "another model is shipped: its digest is the tag of edje-model"
    workers = {
        "edje-ingest",
        "edje-rerank",
        "edje-index",
        "edje-gateway",
        "edje-ingest-gpu",
        "edje-rerank-gpu",
        "edje-rerank-tensorrt",
    }
    assert set(ours) == {*workers, "edje-engine-build"}
    assert set(ours.values()) == {version}


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "tensorrt"])
@pytest.mark.parametrize("worker", WORKERS)
def test_the_autoscaler_reads_the_workers_own_group_and_stops_at_the_partitions(overlay: str, worker: str):
    objects = rendered(overlay)
    topics = tomllib.loads((ROOT / "deploy" / "kafka" / "topics.toml").read_text())["topics"]
    scaled = of_kind(objects, "ScaledObject")[worker]["spec"]
    (lag,) = [trigger["metadata"] for trigger in scaled["triggers"] if trigger["type"] == "kafka"]
    variables = environment_of(objects, worker)

    assert scaled["scaleTargetRef"]["name"] == worker
    assert scaled["minReplicaCount"] <= scaled["maxReplicaCount"] <= topics[INPUTS[worker]]["partitions"]
    assert (lag["topic"], lag["consumerGroup"]) == (INPUTS[worker], GROUPS[worker])
    assert not {f"{worker.upper()}_GROUP_ID", f"{worker.upper()}_TOPIC_PREFIX"} & variables.keys()
    assert lag["bootstrapServersFromEnv"] in variables
    assert lag["sasl"].replace("_", "") == variables["KAFKA_SASL_MECHANISM"].lower().replace("-", "")
    assert (lag["tls"] == "enable") == ("SSL" in variables["KAFKA_SECURITY_PROTOCOL"].split("_"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_deployment_of_a_worker_sets_the_number_of_replicas(overlay: str):
    workers = of_kind(rendered(overlay), "Deployment")

    assert [name for name in WORKERS if "replicas" in workers[name]["spec"]] == []


def test_a_gpu_is_requested_exactly_where_the_settings_need_one():
    for overlay in OVERLAYS:
        for worker in WORKERS:
            wants = environment_of(rendered(overlay), worker).get(f"{worker.upper()}_DEVICE", "cpu") != "cpu"
            template = pod_templates(rendered(overlay))[f"Deployment/{worker}"]
            has = any("nvidia.com/gpu" in each["resources"]["limits"] for each in template["spec"]["containers"])

            assert wants == has == (overlay in ("gpu", "tensorrt"))


def test_the_engine_that_is_built_is_the_one_that_workers_wait_for_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    objects = rendered("tensorrt")
    (job,) = of_kind(objects, "Job").values()
    (build,) = job["spec"]["template"]["spec"]["containers"]
    python, minus_m, module, checkpoint, *options = build["command"]
    given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    for name, value in environment_of(objects, "rerank").items():
        monkeypatch.setenv(name, value)
    worker = read_settings(RerankSettings)
    spec = pod_templates(objects)["Deployment/rerank"]["spec"]
    waiting = next(each for each in spec["initContainers"] if each["name"] == "engine")

    # The command is one that trt.build.__main__ takes: it gets as far as missing TensorRT, or the checkpoint.
    asked = typer.testing.CliRunner().invoke(build_command(), [str(tmp_path / "none"), *options])
    assert asked.exit_code == 1, asked.output
    assert (python, minus_m, module, checkpoint) == ("python", "-m", "trt.build", "/checkpoint")
    assert worker.engine == "tensorrt"
    assert given["out"] == str(worker.engine_directory)
    assert f"{given['out']}/manifest.json" in waiting["command"][-1]
    assert given["storage"] == worker.storage
    assert int(given["max-pairs"]) >= worker.max_batch_pairs
    digest = read_digest(ROOT / "deploy" / "models" / "scenes")
    assert digest in given["out"]
    assert job["metadata"]["name"] == f"engine-build-{digest}"


def build_command() -> typer.Typer:
    app = typer.Typer()
    app.command()(trt.build.__main__.main)
    return app


def test_a_backfill_is_a_second_set_of_ingest_workers_with_a_group_of_its_own_and_nothing_else():
    objects = rendered("backfill")
    for found in objects:
        validate(found)
    (deployment,) = of_kind(objects, "Deployment").values()
    beside = of_kind(rendered("cpu"), "Deployment")["ingest"]
    variables = environment_of(objects, "ingest-backfill")

    assert {found["kind"] for found in objects} == {"ConfigMap", "Deployment"}
    assert (
        not deployment["spec"]["selector"]["matchLabels"].items()
        <= beside["spec"]["template"]["metadata"]["labels"].items()
    )
    assert variables["INGEST_GROUP_ID"] != GROUPS["ingest"]
    assert variables | {"INGEST_GROUP_ID": ""} == environment_of(rendered("cpu"), "ingest") | {"INGEST_GROUP_ID": ""}


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@functools.cache
def web_blocks() -> list[tuple[Network, list[Network]]]:
    """Return the networks from which images may come, each with its exceptions."""
    documents = yaml.safe_load_all((KUBERNETES / "base" / "network.yaml").read_text())
    (policy,) = [each for each in documents if each["metadata"]["name"] == "ingest-web"]
    (rule,) = policy["spec"]["egress"]
    blocks = [peer["ipBlock"] for peer in rule["to"]]
    return [
        (ipaddress.ip_network(block["cidr"]), [ipaddress.ip_network(hole) for hole in block["except"]])
        for block in blocks
    ]


def may_be_reached(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return any(address in network and not any(address in hole for hole in holes) for network, holes in web_blocks())


@settings(deadline=None)  # the first example reads the manifest
@given(st.ip_addresses())
def test_an_image_comes_from_no_address_that_is_not_public(address):
    assert address.is_global or not may_be_reached(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111"])
def test_an_image_may_come_from_a_public_address(address: str):
    assert may_be_reached(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "169.254.169.254", "100.64.0.1", "127.0.0.1", "224.0.0.1", "::1", "::ffff:10.0.0.1", "fd00::1"],
)
def test_an_image_never_comes_from_inside(address: str):
    assert not may_be_reached(ipaddress.ip_address(address))

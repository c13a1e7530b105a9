"""The overlays on a real Kubernetes API server: accepted, admitted at the restricted Pod Security level, idempotent.

A real promtool checks the alerts. `make test-kubernetes` runs these tests; the first run builds the API server.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy_manifests import KUBERNETES, OVERLAYS, WORKERS, Object, pod_templates, rendered
from deploy_queries import rules
from deploy_tools import CONTROL_PLANE, custom_definitions, promtool, run
from kubernetes_harness import ApiServer, Etcd

#: The first run builds the API server and kubectl.
pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server with KEDA's and the Prometheus operator's definitions, as on a platform that has both."""
    folder = tmp_path_factory.mktemp("kubernetes")
    store = Etcd(folder / "etcd")
    server = ApiServer(folder / "apiserver", store.url)
    try:
        store.start()
        server.start()
        files = [f"--filename={path}" for path in custom_definitions()]
        server.done("apply", "--server-side", *files)
        server.done("wait", "--for=condition=Established", "--timeout=60s", *files)
        yield server
    finally:
        server.stop()
        store.stop()


@pytest.fixture(params=OVERLAYS)
def applied(request: pytest.FixtureRequest, api_server: ApiServer) -> tuple[str, ApiServer]:
    """An overlay, applied over the one before."""
    apply(api_server, request.param)
    return request.param, api_server


def apply(server: ApiServer, overlay: str) -> None:
    server.done("apply", "--server-side", f"--kustomize={KUBERNETES / 'overlays' / overlay}")


def versions(server: ApiServer, overlay: str) -> dict[str, object]:
    """Return a value per object that changes with the object: version and generation; for a volume claim its content.

    The API server writes a claim again when it is applied again, without a visible change.
    """
    found = server.get(f"--kustomize={KUBERNETES / 'overlays' / overlay}")
    return {
        f"{each['kind']}/{each['metadata']['name']}": each["spec"]
        if each["kind"] == "PersistentVolumeClaim"
        else (each["metadata"]["resourceVersion"], each["metadata"].get("generation"))
        for each in found["items"]
    }


def pod_of(template: Object) -> Object:
    metadata = {"generateName": "try-", "namespace": "edje", "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def try_pod(server: ApiServer, pod: Object) -> tuple[int, str]:
    """Submit a pod for admission; return kubectl's status and output."""
    result = server.kubectl("create", "--dry-run=server", "--filename=-", "--output=name", text=json.dumps(pod))
    return result.returncode, result.stderr


def test_an_overlay_is_accepted_and_applying_it_again_changes_nothing(applied):
    overlay, server = applied
    before = versions(server, overlay)

    apply(server, overlay)

    assert len(before) == len(rendered(overlay))
    assert versions(server, overlay) == before


def test_kubectl_renders_an_overlay_as_the_other_tests_read_it(applied):
    overlay, server = applied

    made = list(yaml.safe_load_all(server.done("kustomize", str(KUBERNETES / "overlays" / overlay))))

    def key(found: Object) -> tuple[str, str]:
        return found["kind"], found["metadata"]["name"]

    assert sorted(made, key=key) == sorted(rendered(overlay), key=key)


def test_every_pod_is_admitted_under_the_restricted_level_and_with_its_service_account(applied):
    overlay, server = applied
    templates = pod_templates(rendered(overlay))

    # Created here, because no controller does it; pods without a service account get this one.
    server.kubectl("create", "serviceaccount", "default", "--namespace=edje")
    for name, template in templates.items():
        status, said = try_pod(server, pod_of(template))
        assert status == 0, f"{name}: {said}"

    assert {*(f"Deployment/{worker}" for worker in (*WORKERS, "index")), "StatefulSet/gateway"} <= templates.keys()


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("runAsNonRoot", {"runAsNonRoot": False, "runAsUser": 0}),
        ("seccompProfile", {"seccompProfile": {"type": "Unconfined"}}),
        ("privileged", {"privileged": True, "allowPrivilegeEscalation": True}),
    ],
)
def test_a_pod_that_asks_for_more_would_be_refused(applied, what: str, fault: Object):
    overlay, server = applied
    pod = copy.deepcopy(pod_of(pod_templates(rendered(overlay))["Deployment/rerank"]))
    pod["spec"]["containers"][0]["securityContext"] |= fault

    status, said = try_pod(server, pod)

    assert status != 0
    assert 'violates PodSecurity "restricted' in said
    assert what in said


def test_a_field_that_does_not_exist_is_refused(api_server: ApiServer):
    template = copy.deepcopy(pod_templates(rendered("cpu"))["Deployment/rerank"])
    template["spec"]["terminationGracePeriod"] = 60
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "rerank", "namespace": "default"},
        "spec": {"selector": {"matchLabels": template["metadata"]["labels"]}, "template": template},
    }

    result = api_server.kubectl("apply", "--server-side", "--filename=-", text=json.dumps(deployment))

    assert result.returncode != 0
    assert "terminationGracePeriod" in result.stderr


def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    shutil.copy(CONTROL_PLANE / "alerts_test.yaml", tmp_path)

    run([str(promtool()), "check", "rules", "rules.yaml"], cwd=tmp_path)
    run([str(promtool()), "test", "rules", "alerts_test.yaml"], cwd=tmp_path)

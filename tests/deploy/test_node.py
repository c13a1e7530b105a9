"""The node that runs pods as local processes, without an API server: probes, variables, paths, restarts, ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_container import Places, SpecUnmet, environment, plain_data
from node_pod import Ended, PodRun
from node_probes import ContainerHealth
from service_worker import eventually

PROBE = {"periodSeconds": 5, "successThreshold": 1, "failureThreshold": 3, "timeoutSeconds": 1}
ALL = {f"{kind}Probe": PROBE for kind in ("startup", "readiness", "liveness")}


def data_of(kind: str, name: str) -> dict[str, str] | None:
    return {("ConfigMap", "a"): {"X": "1", "Y": "2"}, ("Secret", "s"): {"KEY": "hidden"}}.get((kind, name))


def test_only_the_startup_probe_runs_until_it_has_succeeded():
    health = ContainerHealth(ALL, now=0.0)
    assert health.due(now=0.0) == ["startup"]

    health.note("startup", False, now=0.0)
    assert (health.due(now=4.9), health.due(now=5.0)) == ([], ["startup"])
    health.note("startup", True, now=5.0)

    assert health.due(now=5.0) == ["readiness", "liveness"]
    assert (health.is_started, health.is_ready) == (True, False)


def test_a_container_is_ready_after_one_answer_and_unready_after_as_many_failures_as_the_spec_says():
    health = ContainerHealth({"readinessProbe": PROBE}, now=0.0)
    seen = []
    for number, success in enumerate([True, False, False, True, False, False, False]):
        health.note("readiness", success, now=5.0 * number)
        seen.append(health.is_ready)

    assert seen == [True, True, True, True, True, True, False]
    assert not health.must_restart


@given(st.lists(st.booleans(), max_size=12), st.sampled_from(["startup", "liveness"]))
def test_a_container_is_restarted_exactly_when_its_probe_has_failed_often_enough_in_a_row(answers, kind):
    health = ContainerHealth({f"{kind}Probe": PROBE}, now=0.0)
    restarts = []
    for number, success in enumerate(answers):
        health.note(kind, success, now=5.0 * number)
        restarts.append(health.must_restart)
        if kind == "startup" and (health.is_started or health.must_restart):
            break

    in_a_row = [number >= 2 and not any(answers[number - 2 : number + 1]) for number in range(len(restarts))]
    first_restart = restarts.index(True) if True in restarts else None
    assert first_restart == (in_a_row.index(True) if True in in_a_row else None)


def test_a_container_without_probes_is_ready_at_once():
    assert ContainerHealth({}, now=0.0).is_ready


def test_variables_come_from_maps_and_secrets_and_of_two_the_later_wins():
    secret = {"secretKeyRef": {"name": "s", "key": "KEY"}}
    absent = {"secretKeyRef": {"name": "s", "key": "NONE", "optional": True}}
    container = {
        "envFrom": [{"configMapRef": {"name": "a"}}],
        "env": [
            {"name": "Y", "value": "3"},
            {"name": "K", "valueFrom": secret},
            {"name": "N", "valueFrom": absent},
        ],
    }

    variables = environment(container, data_of)

    assert {name: variables.get(name) for name in "XYKN"} == {"X": "1", "Y": "3", "K": "hidden", "N": None}


@pytest.mark.parametrize(
    ("container", "said"),
    [
        ({"envFrom": [{"configMapRef": {"name": "none"}}]}, "no ConfigMap none"),
        ({"env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "NONE"}}}]}, "has no key NONE"),
        ({"env": [{"name": "K", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]}, "variables from fieldRef"),
    ],
)
def test_a_reference_to_a_missing_object_is_an_error_that_names_it(container: dict[str, Any], said: str):
    with pytest.raises(SpecUnmet, match=said):
        environment(container, data_of)


def test_a_secret_is_decoded_as_a_container_sees_it():
    assert plain_data("Secret", {"data": {"KEY": "aGlkZGVu"}}) == {"KEY": "hidden"}
    assert plain_data("ConfigMap", {}) == {}


def test_a_mounted_path_is_a_folder_of_the_pod_and_every_address_the_pods_own(tmp_path: Path):
    container = {"volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "deep", "mountPath": "/tmp/deep"}]}

    places = Places(container, tmp_path, "127.9.9.9", {"/model": Path("/elsewhere")})

    words = ["/tmp", "/tmp/deep/x", "/tmporary", "/model/.", "0.0.0.0", "redis://host/tmp"]
    assert [places.local(word) for word in words] == [
        f"{tmp_path}/tmp",
        f"{tmp_path}/deep/x",
        "/tmporary",
        "/elsewhere/.",
        "127.9.9.9",
        "redis://host/tmp",
    ]


@pytest.fixture
def run_pod(tmp_path: Path) -> Iterator[Callable[..., PodRun]]:
    """Return a function that makes a pod whose only container runs a line of shell."""
    executor, pods = ThreadPoolExecutor(2), []

    def run(line: str, **more: Any) -> PodRun:
        container = {"name": "main", "image": "registry.example/shell:1", "command": ["/bin/sh", "-c", line]}
        spec = {"containers": [container], "terminationGracePeriodSeconds": 30, **more}
        pod = {"metadata": {"name": f"pod-{len(pods)}", "namespace": "n", "labels": {}}, "spec": spec}
        run = PodRun(pod, "127.9.9.9", tmp_path / f"pod-{len(pods)}", {"shell": {}}, data_of, executor)
        pods.append(run)
        return run

    yield run
    for pod in pods:
        pod.close()
    executor.shutdown()


def turned_until(pod: PodRun, now: float, number: int) -> list[Ended]:
    """Turn at this time until this many containers have ended."""
    ended: list[Ended] = []

    def enough() -> bool:
        pod.turn(now)
        ended.extend(pod.take_ended())
        return len(ended) >= number

    eventually(enough, f"{number} ends")
    return ended


def test_a_container_that_ends_is_started_again_at_once_and_then_after_a_growing_pause(run_pod):
    pod = run_pod("exit 3")

    first = turned_until(pod, 0.0, number=1)
    second = turned_until(pod, 0.0, number=1)
    pod.turn(9.9)
    restarts = pod.status()["containerStatuses"][0]["restartCount"]
    turned_until(pod, 10.0, number=1)

    assert [(end.status, end.was_asked) for end in first + second] == [(3, False)] * 2
    assert restarts == 1
    assert pod.status()["containerStatuses"][0]["restartCount"] == 2


def test_a_container_that_ignores_the_signal_is_killed_when_its_grace_period_is_over(run_pod):
    pod = run_pod("trap '' TERM; echo up; while :; do sleep 0.05; done")
    pod.turn(0.0)
    eventually(lambda: pod.log.read_text() == "up\n", "it runs")

    pod.end(100.0)
    pod.turn(129.9)
    assert not pod.is_over
    (end,) = turned_until(pod, 130.0, number=1)

    assert (end.status, end.was_asked, pod.is_over) == (-signal.SIGKILL, True, True)


def test_an_init_container_that_fails_is_an_error_that_names_it(run_pod):
    init = {"name": "model", "image": "shell", "command": ["/bin/false"]}
    pod = run_pod("exit 0", initContainers=[init])

    with pytest.raises(SpecUnmet, match="the init container model ended with 1"):
        turned_until(pod, 0.0, number=1)


def test_an_unsupported_volume_is_refused(run_pod):
    with pytest.raises(SpecUnmet, match="hostPath"):
        run_pod("exit 0", volumes=[{"name": "v", "hostPath": {"path": "/"}}])

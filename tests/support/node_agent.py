"""A node for tests: runs the pods of a namespace on a real API server as local processes, and reports on them.

Follows a pod's spec, with the exceptions listed in `node_pod` and `node_container`. Also left out: scheduling, since
every pod is bound to this node, and network policies, since every pod can reach every address.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import urllib.error
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kubernetes_harness import ApiServer
from node_container import plain_data
from node_pod import Ended, Images, PodRun
from server_process import tail

#: Interval of requests to the API server; a kubelet watches instead.
TURN_S = 0.25


class Node:
    """Runs on a thread of its own from `start` to `close`; `check` raises what has ended it."""

    name = "this-machine"

    def __init__(self, api: ApiServer, namespace: str, folder: Path, images: Images) -> None:
        self.ended: list[Ended] = []
        self._api = api
        self._pods_path = f"/api/v1/namespaces/{namespace}/pods"
        self._objects_path = f"/api/v1/namespaces/{namespace}"
        #: The pods as Prometheus reads them from a file.
        self.targets = folder / "targets.json"
        folder.mkdir(parents=True)
        self._folder = folder
        self._images = images
        self._pods: dict[str, PodRun] = {}  # by uid
        self._announced = ""
        self._reported: dict[str, dict[str, Any]] = {}
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="node")
        self._probes = ThreadPoolExecutor(16, thread_name_prefix="probe")
        self._running: Future[None] | None = None
        # All of 127/8 is this machine; a random part of it, so that two nodes do not collide.
        first, second = random.randrange(2, 255), random.randrange(255)
        self._addresses = (f"127.{first}.{second}.{last}" for last in itertools.count(1))

    def start(self) -> None:
        self._running = self._thread.submit(self._run)

    def check(self) -> None:
        """Raise the error that ended the node, if any."""
        if self._running is not None and self._running.done():
            self._running.result()

    def kill_a_pod(self, prefix: str) -> str:
        """Kill (-9) the process of a pod that is ready and whose name begins so; returns the pod's name."""
        ready = [pod for pod in list(self._pods.values()) if pod.name.startswith(prefix) and pod.is_ready]
        victim = random.choice(ready)
        victim.kill()
        return victim.name

    def logs(self) -> str:
        """The last lines of every pod that is or was here."""
        logs = sorted(self._folder.glob("*/container.log"))
        return "\n".join(f"--- the end of {log.parent.name}\n{tail(log, 1_500)}" for log in logs)

    def close(self) -> None:
        self._stop.set()
        self._thread.shutdown()
        for pod in self._pods.values():
            pod.close()
        self._probes.shutdown(cancel_futures=True)

    def _run(self) -> None:
        while not self._stop.wait(TURN_S):
            self._turn(time.monotonic())

    def _turn(self, now: float) -> None:
        listed = {pod["metadata"]["uid"]: pod for pod in self._api.call("GET", self._pods_path)["items"]}
        for uid, pod in listed.items():
            if uid not in self._pods and "deletionTimestamp" not in pod["metadata"]:
                self._take(uid, pod)
        for uid, run in list(self._pods.items()):
            if uid not in listed or "deletionTimestamp" in listed[uid]["metadata"]:
                run.end(now)
            run.turn(now)
            self.ended += run.take_ended()
            if run.is_over:
                del self._pods[uid]
                self._delete(run.name)
            else:
                self._report(uid, run)
        self._announce()

    def _announce(self) -> None:
        targets = json.dumps([target for run in self._pods.values() for target in run.targets()])
        if targets != self._announced:
            # Written atomically, because Prometheus watches the file.
            partial = self.targets.with_suffix(".partial")
            partial.write_text(targets)
            partial.rename(self.targets)
            self._announced = targets

    def _take(self, uid: str, pod: Mapping[str, Any]) -> None:
        name = pod["metadata"]["name"]
        # A StatefulSet creates its pods again under the same names.
        folder, ip = self._folder / f"{name}-{uid[:8]}", next(self._addresses)
        self._pods[uid] = PodRun(pod, ip, folder, self._images, self._data_of, self._probes)
        target = {"apiVersion": "v1", "kind": "Node", "name": self.name}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        self._api.call("POST", f"{self._pods_path}/{name}/binding", binding)

    def _report(self, uid: str, run: PodRun) -> None:
        status = run.status()
        if status != self._reported.get(uid) and self._call_unless_gone(
            "PATCH", f"{self._pods_path}/{run.name}/status", {"status": status}
        ):
            self._reported[uid] = status

    def _delete(self, name: str) -> None:
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
        self._call_unless_gone("DELETE", f"{self._pods_path}/{name}", options)

    def _call_unless_gone(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return self._api.call(method, path, body)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise

    def _data_of(self, kind: str, name: str) -> dict[str, str] | None:
        plural = {"ConfigMap": "configmaps", "Secret": "secrets"}[kind]
        try:
            return plain_data(kind, self._api.call("GET", f"{self._objects_path}/{plural}/{name}"))
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise

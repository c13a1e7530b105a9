"""One pod: runs its containers one after the other, its probes, restarts and end, and reports its status.

Does what a kubelet does with the fields that the manifests use: init containers, command and variables, startup,
readiness and liveness probes, restarts with a growing pause, SIGTERM, grace period, SIGKILL.
The node turns it and passes the time; knows nothing of the API server.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from node_container import (
    ContainerProcess,
    DataOf,
    Places,
    Spec,
    SpecUnmet,
    container_port,
    containers,
    environment,
    image_name,
    volume_kinds,
)
from node_probes import ContainerHealth, ProbeKind

#: The first restart is at once, the second after this long, and each further one after twice as long.
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 10.0, 300.0
#: Images by name: for each folder in them that a container names, where it is here.
Images = Mapping[str, Mapping[str, Path]]


@dataclass(frozen=True, slots=True)
class Ended:
    """A container that has ended: its pod, exit status, whether it was asked to end, and its log."""

    pod: str
    status: int
    was_asked: bool
    log: Path


class PodRun:
    """A pod on this node, from its binding to the end of its process."""

    def __init__(self, pod: Spec, ip: str, folder: Path, images: Images, data_of: DataOf, probes: Executor) -> None:
        """Raises `SpecUnmet` for what this node leaves out."""
        spec = pod["spec"]
        unknown = set(volume_kinds(spec)) - {"emptyDir"}
        if unknown:
            raise SpecUnmet(f"volumes of {', '.join(sorted(unknown))} are not among what this node has")
        self._metadata = pod["metadata"]
        self.name: str = self._metadata["name"]
        self.ip = ip
        self.log = folder / "container.log"
        self._ended: list[Ended] = []
        self._folder, self._images, self._data_of, self._executor = folder, images, data_of, probes
        self._grace_s: float = spec["terminationGracePeriodSeconds"]
        self._init, self._container = containers(spec)
        folder.mkdir(parents=True)
        self._process: ContainerProcess | None = None
        self._health: ContainerHealth | None = None  # of the container that stays, while it runs
        self._asked: dict[ProbeKind, tuple[Future[bool], float]] = {}
        self._num_starts = 0
        self._start_at = 0.0
        self._kill_at: float | None = None  # the end of a grace period that runs
        self._is_ending = False
        self._changed_at = _stamp()
        self._was_ready = False

    @property
    def is_ready(self) -> bool:
        return self._health is not None and self._health.is_ready and not self._is_ending

    @property
    def is_over(self) -> bool:
        """Whether it was asked to end and has ended."""
        return self._is_ending and self._process is None

    def turn(self, now: float) -> None:
        """Start, probe, restart and end the containers that are due."""
        if self._process is not None and (status := self._process.exit_status()) is not None:
            self._note_end(status, now)
        if self._process is not None and self._kill_at is not None and now >= self._kill_at:
            self._process.kill()
        if self._is_ending:
            return
        if self._process is None and now >= self._start_at:
            self._start(now)
        elif self._health is not None:
            self._probe(self._health, now)

    def end(self, now: float) -> None:
        """Ask it to end, once; kill it when the grace period is over."""
        if not self._is_ending:
            self._is_ending = True
            self._terminate(now)

    def targets(self) -> list[dict[str, Any]]:
        """Each port of the pod, with the labels under which a Prometheus in the cluster would find it."""
        labels = {_meta("namespace"): self._metadata["namespace"], _meta("pod_name"): self.name}
        labels |= {_meta(f"pod_label_{name}"): value for name, value in self._metadata["labels"].items()}
        container = {_meta("pod_container_name"): self._container["name"]}
        return [
            {
                "targets": [f"{self.ip}:{port['containerPort']}"],
                "labels": labels | container | {_meta("pod_container_port_name"): port["name"]},
            }
            for port in self._container.get("ports", ())
        ]

    def take_ended(self) -> list[Ended]:
        """Return the container's ends since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def kill(self) -> None:
        """End it as the kernel does when memory runs out; it is started again."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End it because the node ends."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def status(self) -> dict[str, Any]:
        """Return the status for the API server."""
        is_ready = self.is_ready
        if is_ready != self._was_ready:
            self._was_ready, self._changed_at = is_ready, _stamp()
        condition = {"status": str(is_ready), "lastTransitionTime": self._changed_at}
        state = {"running": {}} if self._health is not None else {"waiting": {"reason": "ContainerCreating"}}
        return {
            "phase": "Running" if self._num_starts else "Pending",
            "podIP": self.ip,
            "podIPs": [{"ip": self.ip}],
            "conditions": [{"type": kind, **condition} for kind in ("Ready", "ContainersReady")],
            "containerStatuses": [
                {
                    "name": self._container["name"],
                    "image": self._container["image"],
                    "imageID": "",
                    "ready": is_ready,
                    "started": self._health is not None and self._health.is_started,
                    "restartCount": max(0, self._num_starts - 1),
                    "state": state,
                }
            ],
        }

    def _start(self, now: float) -> None:
        container = self._init[0] if self._init else self._container
        places = Places(container, self._folder, self.ip, self._images[image_name(container)])
        variables = environment(container, self._data_of)
        self._process = ContainerProcess(container, variables, places, self._folder, self.log)
        if not self._init:
            self._health = ContainerHealth(container, now)
            self._num_starts += 1

    def _note_end(self, status: int, now: float) -> None:
        self._process = self._kill_at = None
        if self._init:
            if status != 0 and not self._is_ending:
                raise SpecUnmet(f"{self.name}: the init container {self._init[0]['name']} ended with {status}")
            del self._init[0]
            return
        self._health = None
        self._asked.clear()
        self._ended.append(Ended(self.name, status, self._is_ending, self.log))
        backoff_s = FIRST_BACKOFF_S * 2 ** (self._num_starts - 2) if self._num_starts > 1 else 0.0
        self._start_at = now + min(backoff_s, LONGEST_BACKOFF_S)

    def _probe(self, health: ContainerHealth, now: float) -> None:
        for kind, (answer, asked_at) in list(self._asked.items()):
            if answer.done():
                del self._asked[kind]
                health.note(kind, answer.result(), asked_at)
        for kind in health.due(now):
            if kind not in self._asked:
                spec = self._container[f"{kind}Probe"]
                port = container_port(self._container, spec["httpGet"]["port"])
                url = f"http://{self.ip}:{port}{spec['httpGet']['path']}"
                self._asked[kind] = self._executor.submit(answers, url, spec["timeoutSeconds"]), now
        if health.must_restart:
            self._health = None
            self._terminate(now)

    def _terminate(self, now: float) -> None:
        if self._process is not None:
            self._kill_at = now + self._grace_s
            self._process.terminate()


def answers(url: str, timeout_s: float) -> bool:
    """Whether a probe of this address succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s):
            return True
    except OSError:
        return False


def _meta(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", f"__meta_kubernetes_{name}")


def _stamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

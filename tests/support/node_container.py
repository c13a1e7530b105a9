"""One container as a local process, with the command and the variables that the pod's spec says.

Left out, because one machine without images and namespaces has them not: the image (its programs are those of this
environment, other files of it lie in a folder here), user and capabilities, limits of memory, a file system of its own
(what is mounted is a folder of the pod, named so in commands and variables), a host name of its own and a network of
its own (0.0.0.0 is the pod's loopback address). Knows nothing of probes and of the API server.
"""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from server_process import WATCHDOG

Spec = Mapping[str, Any]
#: A ConfigMap's or Secret's data by kind and name, None where there is no such object.
DataOf = Callable[[str, str], Mapping[str, str] | None]

#: What the workers' images set, with this environment's programs in place of theirs.
_OF_THE_IMAGE = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": "/tmp", "PYTHONUNBUFFERED": "1"}
_SOURCES = {
    "configMapRef": "ConfigMap",
    "secretRef": "Secret",
    "configMapKeyRef": "ConfigMap",
    "secretKeyRef": "Secret",
}


class SpecUnmet(Exception):
    """The spec refers to what is not there, or to what this node leaves out; the message names it."""


def environment(container: Spec, data_of: DataOf) -> dict[str, str]:
    """The variables of a container; of two of one name the later wins, as in a cluster. Raises `SpecUnmet`."""
    variables = dict(_OF_THE_IMAGE)
    for source in container.get("envFrom", ()):
        variables |= _data(source, data_of) or {}
    for variable in container.get("env", ()):
        if "valueFrom" not in variable:
            variables[variable["name"]] = variable.get("value", "")
            continue
        ((_, reference),) = variable["valueFrom"].items()
        data = _data(variable["valueFrom"], data_of)
        if data is not None and reference["key"] in data:
            variables[variable["name"]] = data[reference["key"]]
        elif not reference.get("optional"):
            raise SpecUnmet(f"{variable['name']}: {reference['name']} has no key {reference['key']}")
    return variables


def _data(source: Spec, data_of: DataOf) -> Mapping[str, str] | None:
    ((kind, reference),) = source.items()
    if kind not in _SOURCES:
        raise SpecUnmet(f"variables from {kind} are not among what this node knows")
    data = data_of(_SOURCES[kind], reference["name"])
    if data is None and not reference.get("optional"):
        raise SpecUnmet(f"no {_SOURCES[kind]} {reference['name']}")
    return data


def plain_data(kind: str, found: Spec) -> dict[str, str]:
    """The data of a ConfigMap or Secret as a container sees it."""
    data = found.get("data") or {}
    return (
        dict(data) if kind == "ConfigMap" else {name: base64.b64decode(value).decode() for name, value in data.items()}
    )


class Places:
    """Where a container's paths and addresses are on this machine."""

    def __init__(self, container: Spec, pod_folder: Path, pod_ip: str, image_files: Mapping[str, Path]) -> None:
        """`image_files` says where the folders of the container's image are. Makes the pod's volumes."""
        mounts = {mount["mountPath"]: pod_folder / mount["name"] for mount in container.get("volumeMounts", ())}
        for folder in mounts.values():
            folder.mkdir(parents=True, exist_ok=True)
        self._folders = {path: str(folder) for path, folder in (mounts | dict(image_files)).items()}
        self._pod_ip = pod_ip
        names = "|".join(re.escape(path) for path in sorted(self._folders, key=len, reverse=True))
        self._path = re.compile(rf"^(?:{names})(?=/|$)") if names else None

    def local(self, word: str) -> str:
        """A variable's value or a word of a command, as this machine has it."""
        if word == "0.0.0.0":
            return self._pod_ip
        return self._path.sub(lambda found: self._folders[found[0]], word) if self._path else word


class ContainerProcess:
    """A container that runs, or has ended; whoever ends this program ends it too."""

    def __init__(self, container: Spec, variables: Mapping[str, str], places: Places, folder: Path, log: Path) -> None:
        command = [*container.get("command", ()), *container.get("args", ())]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [places.local(word) for word in command],
                cwd=folder,
                # PATH is of this machine already, and may lie under a path that is a container's elsewhere.
                env={name: value if name == "PATH" else places.local(value) for name, value in variables.items()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "watchdog", str(self._process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def exit_status(self) -> int | None:
        """None while it runs; of one that a signal has ended, the signal's negative number."""
        status = self._process.poll()
        if status is not None and self._watchdog.stdin is not None and not self._watchdog.stdin.closed:
            self._watchdog.kill()
            self._watchdog.wait()
            self._watchdog.stdin.close()
        return status

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.wait()
        self.exit_status()


def containers(spec: Spec) -> tuple[list[Spec], Spec]:
    """The init containers in their order, and the one that stays. Raises `SpecUnmet` if several stay."""
    if len(spec["containers"]) != 1:
        raise SpecUnmet(f"this node runs one container a pod, not {len(spec['containers'])}")
    return list(spec.get("initContainers", ())), spec["containers"][0]


def image_name(container: Spec) -> str:
    """The name of an image without registry and tag."""
    return str(container["image"]).rpartition("/")[2].partition(":")[0]


def container_port(container: Spec, port: str | int) -> int:
    """The number of a port that a probe names. Raises `SpecUnmet`."""
    if isinstance(port, int):
        return port
    for known in container.get("ports", ()):
        if known.get("name") == port:
            return int(known["containerPort"])
    raise SpecUnmet(f"{container['name']} has no port named {port}")


def volume_kinds(spec: Spec) -> Iterator[str]:
    for volume in spec.get("volumes", ()):
        yield from volume.keys() - {"name"}

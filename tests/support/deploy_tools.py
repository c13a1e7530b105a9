"""Programs that the deployment's tests run, made once per version in a cache outside of the tree.

A test builds the programs that it uses; a program that cannot be built here is named. Knows nothing of how they are
run on.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from skipping import missing

KEDA = ("github.com/kedacore/keda/v2", "v2.19.0")
KUSTOMIZE = ("sigs.k8s.io/kustomize/kustomize/v5", "v5.7.1")
#: Where the definitions of KEDA's and the Prometheus operator's objects are.
CRDS = {
    KEDA: "config/crd/bases",
    ("github.com/prometheus-operator/prometheus-operator", "v0.90.1"): "example/prometheus-operator-crd",
}
#: A Go module that builds kube-apiserver, kube-controller-manager and kubectl; its go.mod says which.
CONTROL_PLANE = Path(__file__).parent / "kubernetes"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edje-tools"


def kustomize() -> Path:
    module, version = KUSTOMIZE
    return (
        made(f"kustomize-{version}", lambda folder: go("install", f"{module}@{version}", GOBIN=str(folder)))
        / "kustomize"
    )


@functools.cache
def custom_definitions() -> list[Path]:
    """The files with the definitions of KEDA's and the Prometheus operator's objects."""
    folders = (downloaded(module, version) / folder for (module, version), folder in CRDS.items())
    return [path for folder in folders for path in sorted(folder.glob("*.yaml"))]


def control_plane() -> Path:
    """A folder with `apiserver`, `controllermanager` and `kubectl`; the first time takes many minutes."""
    sources = [CONTROL_PLANE / "go.mod", CONTROL_PLANE / "go.sum", *sorted(CONTROL_PLANE.glob("*/main.go"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]

    def build(folder: Path) -> None:
        flags = ("-p", "1", "-trimpath", "-ldflags", "-s -w", "-o", f"{folder}/")
        go("build", *flags, "./apiserver", "./controllermanager", "./kubectl", cwd=CONTROL_PLANE, CGO_ENABLED="0")

    return made(f"control-plane-{digest}", build)


def keda() -> Path:
    """A folder with KEDA's `operator` and `adapter`; the first time takes many minutes."""
    module, version = KEDA

    def build(folder: Path) -> None:
        # From a copy of the module, because the replacements in its go.mod count only there.
        source = folder / "source"
        shutil.copytree(downloaded(module, version), source, copy_function=shutil.copyfile)
        for path in (source, *source.rglob("*")):
            path.chmod(0o755)
        flags = ("-p", "1", "-trimpath", "-ldflags", "-s -w", "-o", f"{folder}/")
        go("build", *flags, "./cmd/operator", "./cmd/adapter", cwd=source, CGO_ENABLED="0")
        shutil.rmtree(source)

    return made(f"keda-{version}", build)


def etcd() -> Path:
    return debian("etcd-server", "etcd")


def prometheus() -> Path:
    return debian("prometheus", "prometheus")


def promtool() -> Path:
    return debian("prometheus", "promtool")


def debian(package: str, program: str) -> Path:
    """A program that is installed, or else the one of Debian's package, unpacked and not installed."""
    installed = shutil.which(program)
    if installed is not None:
        return Path(installed)

    def unpack(folder: Path) -> None:
        needed("apt-get")
        run(["apt-get", "download", "-qq", package], cwd=folder)
        (archive,) = folder.glob("*.deb")
        run(["dpkg", "-x", str(archive), str(folder)])
        archive.unlink()

    return made(f"debian-{package}-{debian_version(package)}", unpack) / "usr" / "bin" / program


def debian_version(package: str) -> str:
    needed("apt-cache")
    policy = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True, check=True).stdout
    lines = dict(line.strip().split(": ", 1) for line in policy.splitlines() if ": " in line)
    if "Candidate" not in lines:
        missing(f"no Debian package {package}: run apt-get update")
    return lines["Candidate"].replace(":", "_")


def go(*arguments: str, cwd: Path | None = None, **environment: str) -> str:
    needed("go")
    return run(["nice", "-n", "5", "go", *arguments], cwd=cwd, **environment)


def downloaded(module: str, version: str) -> Path:
    """The folder with a Go module's sources, which nobody may write to."""
    return Path(json.loads(go("mod", "download", "-json", f"{module}@{version}"))["Dir"])


def needed(program: str) -> None:
    if shutil.which(program) is None:
        missing(f"no {program} on this machine")


def made(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder of this name, made first if it is missing: atomically, and by one process at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / name
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = CACHE / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


def run(command: list[str], *, cwd: Path | None = None, **environment: str) -> str:
    """Standard output; raises with both outputs if it fails."""
    return run_in({**os.environ, **environment}, command, cwd)


def run_in(environment: Mapping[str, str], command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=dict(environment), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout

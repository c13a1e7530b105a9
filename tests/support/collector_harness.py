"""A real OpenTelemetry Collector for tests: built once from tests/support/collector, OTLP in, a file out."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

from server_process import Server, ServiceError

MODULE = Path(__file__).parent / "collector"
#: Outside of the tree, so that a clean checkout need not build it again.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edje" / "collector"
BUILD_LIMIT_S = 900.0


def collector_binary() -> Path:
    """Return the binary of the module. Raises `ServiceError` if it cannot be built."""
    digest = hashlib.sha256()
    for name in ("go.mod", "go.sum", "main.go"):
        digest.update((MODULE / name).read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    binary = folder / "collector"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / "lock"):
        if not binary.exists():
            _build(binary)
    return binary


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock a file, so that only one of several test processes builds."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(binary: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ServiceError("no Go, which builds the OpenTelemetry Collector (https://go.dev)")
    unfinished = binary.with_suffix(".unfinished")
    built = subprocess.run(
        [go, "build", "-mod=readonly", "-trimpath", "-o", str(unfinished), "."],
        cwd=MODULE,
        env=os.environ | {"CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )
    if built.returncode != 0:
        raise ServiceError(f"the OpenTelemetry Collector cannot be built: {built.stderr[-500:]}")
    unfinished.replace(binary)


class Collector(Server):
    """The Collector on a free port; it writes received data to files (`file`)."""

    name = "collector"
    start_limit_s = 60.0

    def _command(self) -> list[str]:
        config = self.folder / "config.json"  # JSON is YAML
        config.write_text(
            json.dumps(
                {
                    "receivers": {"otlp": {"protocols": {"http": {"endpoint": f"127.0.0.1:{self.port}"}}}},
                    "exporters": {
                        f"file/{signal}": {"path": str(self.file(signal)), "flush_interval": "100ms"}
                        for signal in ("traces", "metrics")
                    },
                    "service": {
                        "telemetry": {"metrics": {"level": "none"}},
                        "pipelines": {
                            signal: {"receivers": ["otlp"], "exporters": [f"file/{signal}"]}
                            for signal in ("traces", "metrics")
                        },
                    },
                }
            )
        )
        return [str(collector_binary()), "--config", f"file:{config}"]

    def _answers(self) -> bool:
        request = Request(f"{self.url}/v1/traces", data=b"{}", headers={"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=2.0) as answer:
                return answer.status == 200
        except OSError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def file(self, signal: str) -> Path:
        """Return the file to which it writes traces or metrics."""
        return self.folder / f"{signal}.jsonl"

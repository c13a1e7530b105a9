"""One worker process: its settings in the environment, its log, its exit status and its pages.

Also defines how tests wait. Knows nothing of topics and events.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from server_process import WATCHDOG, free_port, tail

ROOT = Path(__file__).resolve().parents[2]
#: Time limit of a process's start or answer on a busy machine.
LIMIT_S = 60.0
#: Prefixes of variables that must not leak from the developer's shell into a worker.
_PREFIXES = ("RERANK_", "INGEST_", "INDEX_", "GATEWAY_", "KAFKA_", "REDIS_", "DATABASE_", "OTEL_")


def eventually(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> float:
    """Wait until the condition is true; returns the seconds it took. Tests wait nowhere else."""
    started, pause = time.monotonic(), threading.Event()
    while not condition():
        waited_s = time.monotonic() - started
        assert waited_s < limit_s, f"after {waited_s:.0f} s still not: {what}"
        pause.wait(0.02)
    return time.monotonic() - started


def let_pass(seconds: float) -> None:
    """Wait, so that an outage lasts for a while."""
    threading.Event().wait(seconds)


class Worker:
    """One worker process; its standard output and error are one file."""

    def __init__(self, kind: str, settings: Mapping[str, str], log: Path, program: Sequence[str] = ()) -> None:
        """`settings` are whole variables: RERANK_ENGINE, REDIS_URL. `program` replaces Python's arguments."""
        self.kind = kind
        self.log = log
        self.port = free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(_PREFIXES)}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *(program or ("-m", f"workers.{kind}"))],
                cwd=ROOT,
                env={**inherited, **settings, f"{kind.upper()}_HTTP_PORT": str(self.port)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        # However this process ends, the worker goes with it.
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "watchdog", str(self._process.pid)], stdin=subprocess.PIPE
        )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of one of its pages; status 0 where nothing answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait_ready(self, limit_s: float = LIMIT_S) -> Worker:
        def is_ready() -> bool:
            assert self.is_running, f"{self.kind} ended before it was ready:\n{tail(self.log)}"
            return self.get("/readyz")[0] == 200

        eventually(is_ready, f"{self.kind} is ready", limit_s)
        return self

    def has_ended(self, reason: str) -> bool:
        """Whether it has ended; its log must contain this reason."""
        if self.is_running:
            return False
        assert reason in self.log.read_text(), f"{self.kind} ended for another reason than {reason!r}"
        return True

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, 0 if it is missing."""
        return self.metrics().get((name, frozenset(labels.items())), 0.0)

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
        }

    def terminate(self) -> None:
        """Ask it to drain."""
        self._process.terminate()

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Wait for its end and return the exit status."""
        status = self._process.wait(limit_s)
        self._dismiss_watchdog()
        return status

    def stop(self) -> int:
        """Drain and end; returns the exit status."""
        self.terminate()
        return self.wait()

    def kill(self) -> None:
        """End it as the kernel does when memory runs out."""
        self._dismiss_watchdog()
        self._process.kill()
        self._process.wait()

    def _dismiss_watchdog(self) -> None:
        if self._watchdog.stdin is not None and not self._watchdog.stdin.closed:
            self._watchdog.kill()
            self._watchdog.wait()
            self._watchdog.stdin.close()


#: What `/readyz` waits for after the store.
BUS = ("broker answers", "consumer group joined")


def waits_for(worker: Worker, *conditions: str, why: str = "") -> bool:
    """Whether `/readyz` reports these as missing, with the reason of the first."""
    status, text = worker.get("/readyz")
    lines = text.splitlines()
    said = [line.removeprefix("waits for: ").partition(" (")[0] for line in lines]
    return status == 503 and said == list(conditions) and why in lines[0]

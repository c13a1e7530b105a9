"""Runs the processes in Procfile: starts all of them, or stops all if one fails."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from server_process import Server, ServiceError, tail
from workers.errors import WorkerError

_LINE = re.compile(r"([A-Za-z0-9_-]+):\s*(\S.*)")


def parse_procfile(text: str) -> dict[str, list[str]]:
    """Return the command of each process as words. Raises `ServiceError` for an invalid line."""
    commands = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ServiceError(f"Procfile, line {number}: not `name: command`")
        commands[match[1]] = shlex.split(match[2])
    return commands


class Worker(Server):
    """One worker process with its settings in the environment. It has started when its `/readyz` succeeds."""

    start_limit_s = 120.0

    def __init__(self, name: str, command: list[str], folder: Path, settings: Mapping[str, str]) -> None:
        self.name = name
        super().__init__(folder, settings)
        self._words = command

    def _command(self) -> list[str]:
        # `python` in Procfile means the interpreter that runs this program.
        settings = {
            **self.settings,
            f"{self.name.upper()}_HTTP_PORT": str(self.port),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }
        return ["env", *(f"{name}={value}" for name, value in settings.items()), *self._words]

    def _answers(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def give_up(self) -> None:
        """Send the process a stop signal while another thread waits for its start; the start then fails."""
        if self._process is not None:
            self._process.terminate()

    def problem(self) -> str | None:
        """Return how the process ended with the end of its log, None while it runs."""
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return None
        return f"the {self.name} worker ended with {status}; the end of its log:\n{tail(self.log)}"


def workers_of(
    procfile: Path,
    settings: Mapping[str, str],
    particular: Mapping[str, Mapping[str, str]],
    prefix: str,
    logs: Path,
) -> list[Worker]:
    """Return the processes of Procfile that `particular` names, in Procfile's order.

    `settings` apply to every process, `particular` to one process each, without the process's name as prefix. The
    topic prefix keeps the demo's topics and groups in the user's Kafka separate.
    """
    workers = []
    for name, command in parse_procfile(procfile.read_text()).items():
        if name not in particular:
            continue
        group = {} if name == "gateway" else {"GROUP_ID": f"{prefix}{name}"}
        own = {"TOPIC_PREFIX": prefix, **group, **particular[name]}
        named = {f"{name.upper()}_{setting}": value for setting, value in own.items()}
        workers.append(Worker(name, command, logs, {**settings, **named}))
    return workers


def start_all(workers: Sequence[Worker]) -> None:
    """Start all at once, because most of the time goes into imports."""
    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            for started in as_completed([pool.submit(worker.start) for worker in workers]):
                started.result()
        except BaseException:
            for worker in workers:
                worker.give_up()
            raise


def stop_all(workers: Sequence[Worker]) -> None:
    with ThreadPoolExecutor(len(workers)) as pool:
        for stopped in [pool.submit(worker.stop) for worker in workers]:
            stopped.result()


@contextmanager
def explaining(workers: Sequence[Worker]) -> Iterator[None]:
    """Add to an error the ends of the workers' logs."""
    try:
        yield
    except (ServiceError, WorkerError) as error:
        problems = [problem for worker in workers if (problem := worker.problem()) is not None]
        problems = problems or [f"the end of {worker.name}'s log:\n{tail(worker.log, 2_000)}" for worker in workers]
        raise ServiceError("\n".join([str(error), *problems])) from error

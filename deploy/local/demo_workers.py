"""Starts the processes that Procfile names, as whatever runs a Procfile would, and waits until they are ready."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from server_process import Server, ServiceError, tail

_LINE = re.compile(r"([A-Za-z0-9_-]+):\s*(\S.*)")


def parse_procfile(text: str) -> dict[str, list[str]]:
    """The command of each process, as words. Raises `ServiceError` for a line that is none."""
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
    """One worker with settings of its own in its environment. It has started when it says that it is ready."""

    start_limit_s = 120.0

    def __init__(self, name: str, command: list[str], folder: Path, settings: Mapping[str, str]) -> None:
        self.name = name
        super().__init__(folder, settings)
        self._words = command

    def _command(self) -> list[str]:
        # Procfile says `python`: that is to be the one which runs this.
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
        """Ask the process to end while another thread waits for its start, which then fails."""
        if self._process is not None:
            self._process.terminate()

    def problem(self) -> str | None:
        """What is wrong if the process is no longer there: how it ended, and the end of its log."""
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return None
        return f"the {self.name} worker ended with {status}; the end of its log:\n{tail(self.log)}"

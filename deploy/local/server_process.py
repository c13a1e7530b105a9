"""One server process: start, stop, kill, freeze, and start again on the same port with the same data.

Knows processes and ports; knows nothing of Kafka or Redis.
"""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Below the range that Linux and macOS hand out for outgoing connections. A client that keeps trying the port of a
#: stopped server would otherwise, once in a while, be given that very port and keep the server from coming back.
FREE_PORTS = range(20_000, 32_000)
#: Waits until its end of the pipe is closed, which happens in whatever way the parent ends, and kills the server.
WATCHDOG = 'read -r _; kill -KILL "$1"'


class ServiceError(Exception):
    """A service cannot be had; the message says which and why."""


class Server(ABC):
    """One server process with its data in a folder. Started again, it has the same port and the same data."""

    name: str
    start_limit_s: float
    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        """`settings` go into the server's own configuration, over ours."""
        self.folder = folder
        self.settings = dict(settings or {})
        self.port = free_port()
        self.log = folder / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and return when the server answers; raises `ServiceError` with the end of its log if it does not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C at the terminal is for the parent, which stops the server in its own time.
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._popen_options(),
            )
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "watchdog", str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        give_up_at = time.monotonic() + self.start_limit_s
        while not self._answers():
            status = self._process.poll()
            if status is not None or time.monotonic() > give_up_at:
                what = f"did not answer within {self.start_limit_s:.0f} s" if status is None else f"ended with {status}"
                self.kill()
                raise ServiceError(f"{self.name} {what}; the end of {self.log}:\n{tail(self.log)}")
            time.sleep(0.05)

    def stop(self, grace_s: float = 15.0) -> None:
        """Ask the server to end, then make it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(self.stop_signal)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._forget()

    def kill(self) -> None:
        """End the server as a power cut would."""
        if self._process is not None:
            self._process.kill()
        self._forget()

    def freeze(self) -> None:
        """Stop the clock of the server: connections stay open and nothing answers."""
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        return self._running().pid

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServiceError(f"{self.name} is not running")
        return self._process

    def _forget(self) -> None:
        # The watchdog goes first: once the server is reaped its process number may be somebody else's.
        for process in (self._watchdog, self._process):
            if process is not None:
                if process is self._watchdog:
                    process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
        self._watchdog = self._process = None

    @abstractmethod
    def _command(self) -> list[str]:
        """The program and its arguments."""

    def _popen_options(self) -> dict[str, Any]:
        """Further arguments of `subprocess.Popen`, such as the user that runs the server."""
        return {}

    @abstractmethod
    def _answers(self) -> bool:
        """Whether this very process, and not another on the same port, answers a request."""


def package_folder(package: str, brings: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ServiceError(f"{brings} comes in the package {package}, which is not installed: pip install {package}")
    return Path(spec.origin).parent


def free_port() -> int:
    for port in random.sample(FREE_PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServiceError(f"no free port between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def tail(log: Path, num_bytes: int = 4_000) -> str:
    return log.read_bytes()[-num_bytes:].decode(errors="replace")

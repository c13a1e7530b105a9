"""Runs one server process: start, stop, kill, freeze, and restart on the same port with the same data.

Knows processes and ports, and no particular server.
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

#: Below the ports of outgoing connections on Linux and macOS. Otherwise a client that retries the port of a
#: stopped server may be given that port as its own, and the server could not start again.
FREE_PORTS = range(20_000, 32_000)
#: Waits until its input closes, which happens when the parent ends for any reason, then kills the server.
WATCHDOG = 'read -r _; kill -KILL "$1"'


class ServiceError(Exception):
    """A service cannot be started; the message names it and the reason."""


class Server(ABC):
    """One server process with its data in a folder; a restart keeps the port and the data."""

    name: str
    start_limit_s: float
    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        """`settings` override the defaults in the server's configuration."""
        self.folder = folder
        self.settings = dict(settings or {})
        self.port = free_port()
        self.log = folder / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and return when it answers. Raises `ServiceError` with the end of its log otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # A new session: Ctrl-C at the terminal must reach the parent only, which stops the server in order.
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
        """Send the stop signal, and kill the server if it has not ended after the grace period."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(self.stop_signal)
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._forget()

    def kill(self) -> None:
        """Kill the server, as a power cut would."""
        if self._process is not None:
            self._process.kill()
        self._forget()

    def freeze(self) -> None:
        """Suspend the server: connections stay open and nothing answers."""
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
        # The watchdog ends first, because the id of a reaped server may belong to another process.
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
        """Return the program and its arguments."""

    def _popen_options(self) -> dict[str, Any]:
        """Return further arguments for `subprocess.Popen`, such as the user that runs the server."""
        return {}

    @abstractmethod
    def _answers(self) -> bool:
        """Return whether this process, and not another on the same port, answers a request."""


def package_folder(package: str, brings: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ServiceError(f"{brings} is in the package {package}, which is not installed: pip install {package}")
    return Path(spec.origin).parent


def free_port(ports: range = FREE_PORTS, also: int = 0) -> int:
    """Return a port of this range that is free, and with it the port `also` above it. Raises `ServiceError`."""
    for port in random.sample(ports, 200):
        if all(_is_free(each) for each in {port, port + also}):
            return port
    raise ServiceError(f"no free port between {ports.start} and {ports.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def tail(log: Path, num_bytes: int = 4_000) -> str:
    return log.read_bytes()[-num_bytes:].decode(errors="replace")

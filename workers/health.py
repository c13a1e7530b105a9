"""Serves a worker's state and metrics over HTTP: `/livez`, `/readyz` and `/metrics`.

Alive: the loop turns. Ready: every start condition is met, and no problem is known. Other modules report both states;
this module serves them. Knows neither Kafka nor Redis nor the engine.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from socketserver import BaseServer, ThreadingTCPServer
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from workers.errors import Misconfigured

log = structlog.get_logger(__name__)

#: A connection is closed after this time, however slowly its request arrives or its answer is read.
REQUEST_LIMIT_S = 5.0
#: Connections served at once; a new one closes the oldest.
MAX_CONNECTIONS = 32


class Health:
    """The state of a worker. Safe to use from any thread; time is an argument."""

    def __init__(self, *, waits_for: Iterable[str], stall_limit_s: float) -> None:
        """`waits_for` are the conditions, in words, that must all be met before the worker is ready."""
        self._lock = threading.Lock()
        self._missing = dict.fromkeys(waits_for, "")  # each with the reason, where that is known
        self._problems: dict[str, str] = {}
        self._stall_limit_s = stall_limit_s
        self._last_turn: float | None = None
        self._draining = False

    def met(self, condition: str) -> None:
        """Note that one of the conditions is met. Raises `KeyError` for an unknown one."""
        with self._lock:
            del self._missing[condition]

    def explain(self, condition: str, reason: str) -> None:
        """Note why one of the conditions is not met. Raises `KeyError` for an unknown one."""
        with self._lock:
            if condition not in self._missing:
                raise KeyError(condition)
            self._missing[condition] = reason

    def fail(self, part: str, reason: str) -> None:
        """Note that a part of the worker does not work: not ready until it is `restored`."""
        with self._lock:
            self._problems[part] = reason

    def restore(self, part: str) -> None:
        """Note that a part of the worker works."""
        if part in self._problems:
            with self._lock:
                self._problems.pop(part, None)

    def turned(self, now: float) -> None:
        """Note that the loop has turned; a plain write, because every turn calls this."""
        self._last_turn = now

    def draining(self) -> None:
        """Note that the worker drains: alive, and unready until it ends. A plain write: a signal handler calls this."""
        self._draining = True

    def unready_reasons(self) -> list[str]:
        """Return the reasons why the worker is not ready; empty if it is ready."""
        with self._lock:
            reasons = [
                f"waits for: {condition}" + (f" ({reason})" if reason else "")
                for condition, reason in self._missing.items()
            ]
            reasons += [f"{part}: {reason}" for part, reason in self._problems.items()]
        return [*reasons, "draining"] if self._draining else reasons

    def stall(self, now: float) -> str | None:
        """Return why the worker counts as dead, None while it is alive. Before its first turn it counts as alive."""
        if self._last_turn is None or now - self._last_turn <= self._stall_limit_s:
            return None
        return f"the loop has not turned for {now - self._last_turn:.1f} s; the limit is {self._stall_limit_s:g} s"


class _Server(ThreadingTCPServer):
    """A server whose connections are bounded in number and in time.

    Not `http.server.HTTPServer`, which looks up its host name in the DNS before it serves.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: Callable[[Any, Any, Any], BaseHTTPRequestHandler]) -> None:
        self._open: dict[socket.socket, float] = {}  # connection to time of acceptance; the oldest first
        self._open_lock = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open[request] = time.monotonic()
            if len(self._open) > MAX_CONNECTIONS:
                _cut(next(iter(self._open)))
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Cut the connections whose time is up; called between requests and twice a second."""
        with self._open_lock:
            late = [request for request, at in self._open.items() if at + REQUEST_LIMIT_S < time.monotonic()]
            for request in late:
                _cut(request)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("http connection lost", exc_info=True)


def _cut(request: socket.socket) -> None:
    """End the reads and writes of a connection; its thread then closes it."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _ServerOverIPv6(_Server):
    address_family = socket.AF_INET6


class HealthServer:
    """Serves the three pages from its own threads, as long as the `with` block lasts."""

    def __init__(
        self,
        health: Health,
        registry: CollectorRegistry,
        *,
        clock: Callable[[], float],
        host: str,
        port: int,
        settings: tuple[str, str] = ("http_host", "http_port"),
    ) -> None:
        """Port 0 takes a free port. Raises `Misconfigured`, which names the settings, if the port cannot be bound."""

        class Pages(BaseHTTPRequestHandler):
            timeout = REQUEST_LIMIT_S

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/livez":
                        stall = health.stall(clock())
                        self._answer(503 if stall else 200, stall or "alive")
                    case "/readyz":
                        reasons = health.unready_reasons()
                        self._answer(503 if reasons else 200, "\n".join(reasons) or "ready")
                    case "/metrics":
                        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                        self._send(200, encode(registry), content_type)
                    case _:
                        self._answer(404, "not found; this server has /livez, /readyz and /metrics")

            def _answer(self, status: int, text: str) -> None:
                self._send(status, f"{text}\n".encode(), "text/plain; charset=utf-8")

            def _send(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                log.debug("http", line=format % args)

        try:
            self._server: BaseServer = (_ServerOverIPv6 if ":" in host else _Server)((host, port), Pages)
        except (OSError, OverflowError) as error:
            raise Misconfigured(
                f"health and metrics cannot be served on {host}:{port}: {error}; "
                f"set {settings[1]} to a free port (0 takes any), or change {settings[0]}"
            ) from error
        self._host = host
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])  # type: ignore[index]  # of an internet address

    def __enter__(self) -> HealthServer:
        self._thread.start()
        log.info("health and metrics are served", host=self._host, port=self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def is_serving(self) -> bool:
        """False once its thread has died; the loop then ends the worker."""
        return self._thread.is_alive()

"""Tells the outside whether a worker is alive and ready, and serves its metrics: `/livez`, `/readyz`, `/metrics`.

Alive means that the loop turns, ready means that nothing it waits for at the start is missing; both are noted by those
who know and only read here. Knows neither Kafka nor Redis nor the engine.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from workers.errors import Misconfigured

log = structlog.get_logger(__name__)

#: A probe that sends its request no faster than this is cut off, so that none can hold a thread.
REQUEST_LIMIT_S = 5.0


class Health:
    """What is known about a worker's state. Safe to use from any thread; time is an argument."""

    def __init__(self, *, waits_for: Iterable[str], stall_limit_s: float) -> None:
        """`waits_for` are the conditions, in words, that must all be met before the worker is ready."""
        self._lock = threading.Lock()
        self._missing = dict.fromkeys(waits_for, "")  # each with why, where that is known
        self._stall_limit_s = stall_limit_s
        self._last_turn: float | None = None
        self._draining = False

    def met(self, condition: str) -> None:
        """Note that one of the conditions holds now. Raises `KeyError` for one that nobody waits for."""
        with self._lock:
            del self._missing[condition]

    def explain(self, condition: str, reason: str) -> None:
        """Note why one of the conditions does not hold yet. Raises `KeyError` for one that nobody waits for."""
        with self._lock:
            if condition not in self._missing:
                raise KeyError(condition)
            self._missing[condition] = reason

    def turned(self, now: float) -> None:
        """Note that the loop has turned; a plain write, because this is called in every turn."""
        self._last_turn = now

    def draining(self) -> None:
        """Note that the worker is on its way out: alive, and not ready again."""
        self._draining = True

    def unready_reasons(self) -> list[str]:
        """Why the worker is not ready; empty when it is."""
        with self._lock:
            reasons = [
                f"waits for: {condition}" + (f" ({reason})" if reason else "")
                for condition, reason in self._missing.items()
            ]
        return [*reasons, "draining"] if self._draining else reasons

    def stall(self, now: float) -> str | None:
        """Why the worker counts as dead, None while it is alive. Before its first turn it is starting, not stalled."""
        if self._last_turn is None or now - self._last_turn <= self._stall_limit_s:
            return None
        return f"the loop has not turned for {now - self._last_turn:.1f} s; the limit is {self._stall_limit_s:g} s"


class _Server(ThreadingTCPServer):
    # Not http.server's class: that one asks the DNS for the name of its own address before it serves.
    allow_reuse_address = True
    daemon_threads = True


class _ServerOverIPv6(_Server):
    address_family = socket.AF_INET6


class HealthServer:
    """Serves the three pages from threads of its own, as long as the `with` block lasts."""

    def __init__(
        self, health: Health, registry: CollectorRegistry, *, clock: Callable[[], float], host: str, port: int
    ) -> None:
        """Port 0 takes a free one. Raises `Misconfigured` if the port cannot be had."""

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
                        self._answer(404, "here are /livez, /readyz and /metrics")

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
            self._server = (_ServerOverIPv6 if ":" in host else _Server)((host, port), Pages)
        except (OSError, OverflowError) as error:
            raise Misconfigured(f"health and metrics cannot be served on {host}:{port}: {error}") from error
        self._host = host
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> HealthServer:
        self._thread.start()
        log.info("health and metrics are served", host=self._host, port=self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def is_serving(self) -> bool:
        """False once its thread has died, which is for the loop to notice and to end the worker."""
        return self._thread.is_alive()

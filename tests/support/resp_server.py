"""A server that speaks the Redis protocol and answers each command with a function of the test's.

For replies that no real server gives on request: those of proxies, of servers that are busy or have been demoted.
"""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable

#: Takes a command in its words, upper-case name first; returns the raw reply, or None to close the connection.
Answer = Callable[[list[bytes]], bytes | None]


class RespServer(socketserver.ThreadingTCPServer):
    """Listens on a free port for as long as the `with` block lasts."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.answer = answer
        self.commands: list[bytes] = []
        self.num_connections = 0
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.server_address[1]}/0"

    def __enter__(self) -> RespServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up in the middle of a reply."""


class _Connection(socketserver.StreamRequestHandler):
    server: RespServer

    def handle(self) -> None:
        self.server.num_connections += 1
        while (command := self._read()) is not None:
            self.server.commands.append(command[0])
            reply = self.server.answer(command)
            if reply is None:
                return
            self.wfile.write(reply)

    def _read(self) -> list[bytes] | None:
        header = self.rfile.readline()
        if not header.startswith(b"*"):
            return None
        words = []
        for _ in range(int(header[1:])):
            length = int(self.rfile.readline()[1:])
            words.append(self.rfile.read(length))
            self.rfile.readline()
        return [words[0].upper(), *words[1:]]


class SmallRedis:
    """GET, MGET, GETRANGE and SET over a dict; every other command is unknown."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def __call__(self, command: list[bytes]) -> bytes | None:
        match command:
            case [b"MGET", *keys]:
                return b"*%d\r\n" % len(keys) + b"".join(bulk(self.values.get(key)) for key in keys)
            case [b"GETRANGE", key, start, end]:
                return bulk(self.values.get(key, b"")[int(start) : int(end) + 1])
            case [b"SET", key, value, *_]:
                self.values[key] = value
                return b"+OK\r\n"
            case [name, *_]:
                return b"-ERR unknown command '%s'\r\n" % name
        return None


def bulk(value: bytes | None) -> bytes:
    """Return a value as a bulk string, or the null bulk string."""
    return b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)

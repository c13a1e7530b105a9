"""The in-memory twin of `workers.store.client`: a dict behind the same port, which can be made unreachable.

For tests and for trying a worker without a server; everything is lost when the process ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from protocols.source_position import HEAD_BYTES, may_replace
from workers.errors import Transient


class MemoryStore:
    """Values in a dict; implements `workers.ports.TokenStore`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values: dict[str, tuple[bytes, float]] = {}  # value, and the end of its lifetime
        self._lock = threading.Lock()
        #: While set, every call raises `Transient`, as if the server could not be reached.
        self.away = False

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            self._check()
            return [self._get(key) for key in keys]

    def put_many(self, values: Mapping[str, bytes], *, lifetime_s: float | None = None) -> list[bool]:
        with self._lock:
            self._check()
            ends_at = float("inf") if lifetime_s is None else self._clock() + lifetime_s
            written = [may_replace(value, self._get(key)) for key, value in values.items()]
            for (key, value), is_later in zip(values.items(), written, strict=True):
                if is_later:
                    self._values[key] = (value, ends_at)
            return written

    def exist_many(self, keys: Sequence[str]) -> list[bool]:
        """Return for each key whether the store has a value other than a removal marker."""
        return [value is not None and len(value) > HEAD_BYTES for value in self.get_many(keys)]

    def probe(self, prefixes: Sequence[str], *, writes: bool) -> None:
        self._check()

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def _get(self, key: str) -> bytes | None:
        value, ends_at = self._values.get(key, (None, 0.0))
        return value if self._clock() < ends_at else None

    def _check(self) -> None:
        if self.away:
            raise Transient("the in-memory store is set to be unreachable")

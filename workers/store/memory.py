"""The in-memory twin of `workers.store.client`: a dict behind the same port, which can be told to be away.

For tests and for trying a worker without a server; keeps nothing when the process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from workers.errors import Transient


class MemoryStore:
    """Token blobs in a dict; implements `workers.ports.TokenStore`."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()
        #: While set, every call raises `Transient`, as it does when the server cannot be reached.
        self.away = False

    def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            self._answer()
            return [self._blobs.get(key) for key in keys]

    def put_many(self, blobs: Mapping[str, bytes]) -> None:
        with self._lock:
            self._answer()
            self._blobs.update(blobs)

    def ping(self) -> None:
        self._answer()

    def close(self) -> None:
        """Nothing to let go of."""

    def _answer(self) -> None:
        if self.away:
            raise Transient("the in-memory store is told to be away")

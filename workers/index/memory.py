"""The in-memory twin of `workers.index.client`: rows in a dict behind the same port.

For tests and for trying the gateway without a database; nothing outlives the process.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from protocols.source_position import SourcePosition
from workers.errors import Transient
from workers.index.port import Change, Filter, ImageRow, IndexedImage, Neighbour, RemovedImage, Vector


class MemoryIndex:
    """Images in a dict; implements `workers.index.port.ImageIndex`."""

    def __init__(self) -> None:
        self._rows: dict[str, ImageRow] = {}
        self._positions: dict[str, SourcePosition] = {}
        self._lock = threading.Lock()
        #: While True every call raises `Transient`, as it does when the database cannot be reached.
        self.away = False

    def apply(self, changes: Sequence[Change]) -> frozenset[str]:
        without_vector = set()
        with self._lock:
            self._check()
            for change in changes:
                stored = self._positions.get(change.image_id)
                if stored is not None and not change.position.may_replace(stored):
                    continue
                if isinstance(change, RemovedImage):
                    self._rows.pop(change.image_id, None)
                    self._positions[change.image_id] = change.position
                    continue
                row = change if change.vector is not None else self._with_stored_vector(change)
                if row is None:
                    without_vector.add(change.image_id)
                    continue
                self._rows[change.image_id] = row
                self._positions[change.image_id] = change.position
        return frozenset(without_vector)

    def nearest(self, vector: Vector, limit: int, matching: Filter) -> list[Neighbour]:
        with self._lock:
            self._check()
            found = [
                Neighbour(row.image_id, float(np.dot(row.vector, vector)), row.metadata)
                for row in self._rows.values()
                if row.vector is not None and all(row.metadata.get(key) in values for key, values in matching.items())
            ]
        return sorted(found, key=lambda neighbour: (-neighbour.score, neighbour.image_id))[:limit]

    def find(self, image_ids: Sequence[str]) -> list[IndexedImage | None]:
        with self._lock:
            self._check()
            rows = [self._rows.get(image_id) for image_id in image_ids]
        return [None if row is None else IndexedImage(row.image_id, row.content_sha256, row.metadata) for row in rows]

    def ids_of(self, key: str, values: Sequence[str]) -> list[str | None]:
        with self._lock:
            self._check()
            ids = {row.metadata.get(key): row.image_id for row in self._rows.values()}
        return [ids.get(value) for value in values]

    def count(self) -> int:
        with self._lock:
            self._check()
            return len(self._rows)

    def ping(self) -> None:
        self._check()

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def _with_stored_vector(self, change: ImageRow) -> ImageRow | None:
        stored = self._rows.get(change.image_id)
        if stored is None or stored.content_sha256 != change.content_sha256:
            return None
        return ImageRow(change.image_id, change.position, change.content_sha256, stored.vector, change.metadata)

    def _check(self) -> None:
        if self.away:
            raise Transient("the in-memory index is set to be unreachable")

"""Writes a batch of changes to the index on the calling thread, and retries while the database is away.

If the database cannot hold a row, the batch is halved until that row is alone; the other rows are written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from workers.errors import Poison
from workers.index.changes import EventChange
from workers.index.port import Change, ImageIndex, ImageRow, RemovedImage, Vector
from workers.index.vectors import VectorModel
from workers.ports import Interval
from workers.retrying import Retry

#: Interval at which old markers of removed images are deleted.
MARKER_CLEANING_S = 3600.0


@dataclass(frozen=True, slots=True)
class Written:
    """The results of writing a batch, by image id.

    `without_vector` are the images left out because there is no vector for their content.
    """

    interval: Interval
    poisons: Mapping[str, Poison]
    without_vector: frozenset[str]


class IndexWriter:
    """Turns events into rows and writes them."""

    def __init__(
        self,
        index: ImageIndex,
        vectors: VectorModel,
        retry: Retry,
        *,
        delete_markers: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._vectors = vectors
        self._retry = retry
        self._delete_markers = delete_markers
        self._clock = clock
        self._cleaned_at = clock()

    @property
    def model_digest(self) -> str:
        return self._vectors.model_digest

    @property
    def pooled_dim(self) -> int:
        return self._vectors.pooled_dim

    def write(self, changes: Sequence[EventChange]) -> Written:
        """Write changes to distinct images. Raises `Stopped` after `stop`, `Misconfigured` if access is refused."""
        started_at = self._clock()
        poisons: dict[str, Poison] = {}
        without_vector: frozenset[str] = frozenset()
        batches = [self._rows(changes)]
        while batches:
            batch = batches.pop()
            try:
                without_vector |= self._retry("index_write", partial(self._index.apply, batch))
            except Poison as error:
                if len(batch) == 1:
                    poisons[batch[0].image_id] = error
                else:
                    half = len(batch) // 2
                    batches += [batch[half:], batch[:half]]
        if self._clock() - self._cleaned_at >= MARKER_CLEANING_S:
            self._cleaned_at = self._clock()
            self._retry("index_write", self._delete_markers)
        return Written(Interval(started_at, self._clock()), poisons, without_vector)

    def stop(self) -> None:
        """Give up the write that is being retried."""
        self._retry.stop()

    def _rows(self, changes: Sequence[EventChange]) -> list[Change]:
        pooled = [change.event.embedding for change in changes if change.event and change.event.embedding]
        vectors = iter(self._vectors.of_images(np.array(pooled, np.float32)) if pooled else ())
        return [_row(change, vectors) for change in changes]


def _row(change: EventChange, vectors: Iterator[Vector]) -> Change:
    """Return the row of a change; takes the next vector if the event has an embedding."""
    event = change.event
    if event is None:
        return RemovedImage(change.image_id, change.position)
    vector = next(vectors) if event.embedding else None
    return ImageRow(change.image_id, change.position, event.content_sha256, vector, event.metadata or {})

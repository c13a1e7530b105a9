"""Drops the tokens of changed and removed images from the slab, as `images.indexed` reports them.

The ingest worker publishes an event after it has changed the store. So the next request fetches the new tokens.
Called from the loop's thread; knows nothing of Kafka.
"""

from __future__ import annotations

import structlog

from protocols.encoding import EventError, content_type_of, decode
from protocols.events import ImageIndexed
from protocols.salvage import salvage_id
from workers.metrics import Metrics
from workers.ports import Follower, Gap, Record
from workers.rerank.loading import SlabLoader

log = structlog.get_logger(__name__)

#: Most events of one turn: a backfill publishes thousands per second, and an event without a slot takes microseconds.
MAX_EVENTS_PER_TURN = 256


class Invalidation:
    """Applies the events of a follower to the slab."""

    def __init__(self, loader: SlabLoader, *, model_digest: str, metrics: Metrics) -> None:
        self._loader = loader
        self._model = model_digest
        self._metrics = metrics
        self._follower: Follower | None = None

    def follow(self, follower: Follower) -> None:
        """Apply this follower's events from now on. Drops all slots, because events before its start were missed."""
        self._follower = follower
        self._loader.invalidate_all()

    def turn(self) -> bool:
        """Apply the events that have arrived; returns whether more may wait. Raises the follower's error."""
        if self._follower is None:
            return False
        for _ in range(MAX_EVENTS_PER_TURN):
            taken = self._follower.take()
            if taken is None:
                return False
            if isinstance(taken, Gap):
                log.warning(
                    "events of changed images may be missing: all images are fetched again",
                    topic=taken.partition.topic,
                    partition=taken.partition.number,
                    reason=taken.reason,
                )
                self._metrics.slab_invalidations.inc(self._loader.slots_used())
                self._loader.invalidate_all()
            else:
                self._apply(taken)
        return True

    def _apply(self, record: Record) -> None:
        image_id = _image_id(record)
        if image_id is not None and self._loader.holds(image_id) and self._is_change(image_id, record):
            self._loader.invalidate(image_id)
            self._metrics.slab_invalidations.inc()

    def _is_change(self, image_id: str, record: Record) -> bool:
        """Whether an event may change this model's tokens: a removal, new content, or an unreadable event.

        An event that skipped the write can be the only report of new content: an ingest worker that stored the content
        ended before it published, and its successor found the blob in the store.
        """
        try:
            event = decode(ImageIndexed, record.value, content_type_of(record.headers))
        except EventError:
            return True
        if event.model != self._model:
            return False
        return not event.skipped or not self._loader.has_content(image_id, bytes.fromhex(event.content_sha256))


def _image_id(record: Record) -> str | None:
    if record.key is not None:
        return record.key.decode("utf-8", "replace")
    return salvage_id(record.value, None, "image_id")

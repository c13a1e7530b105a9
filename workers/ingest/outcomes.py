"""Reads image events and writes what comes of them: `images.indexed` and dead letters.

The bridge between the wire contract and the job; decides nothing about when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import structlog
from numpy.typing import NDArray

from protocols.blob import BlobLayout
from protocols.encoding import CONTENT_TYPE_HEADER, JSON, EventError, content_type_of, decode, encode, salvage_id
from protocols.events import ImageIndexed, ImageNew
from protocols.topics import Topics
from workers.dead_letters import DeadLetters
from workers.ingest.stages import Refusal
from workers.job import Finished
from workers.metrics import Metrics
from workers.ports import Headers, Outgoing, Record
from workers.tracing import trace_id_of

log = structlog.get_logger(__name__)


class IngestOutcomes:
    """Writes outcomes for one model. `images.indexed` is JSON whatever the event was: others read it too."""

    def __init__(
        self,
        *,
        topics: Topics,
        layout: BlobLayout,
        child_headers: Callable[[Headers], Headers],
        dead_letters: DeadLetters,
        publish_embedding: bool,
        metrics: Metrics,
    ) -> None:
        self._topics = topics
        self._layout = layout
        self._child_headers = child_headers
        self._dead_letters = dead_letters
        self._publish_embedding = publish_embedding
        self._metrics = metrics

    def read(self, record: Record) -> ImageNew | Refusal:
        """Decode an event."""
        try:
            return decode(ImageNew, record.value, content_type_of(record.headers))
        except EventError as error:
            return Refusal(type(error).__name__, error.code, str(error))

    def indexed(
        self,
        record: Record,
        image_id: str,
        sha256: bytes,
        *,
        timings_s: Mapping[str, float],
        skipped: bool,
        embedding: NDArray[np.float32] | None,
    ) -> Finished:
        """The image's blob is in the store; `skipped` if it was there already, and then nothing was encoded."""
        event = ImageIndexed(
            image_id=image_id,
            model=self._layout.model_digest,
            num_tokens=self._layout.num_tokens,
            dtype=self._layout.storage,
            num_bytes=self._layout.blob_bytes,
            content_sha256=sha256.hex(),
            timings_ms={stage: round(seconds * 1000, 3) for stage, seconds in timings_s.items()},
            skipped=skipped,
            embedding=embedding.tolist() if embedding is not None and self._publish_embedding else None,
        )
        self._metrics.count_event("skipped" if skipped else "ok")
        headers = ((CONTENT_TYPE_HEADER, JSON.encode()), *self._child_headers(record.headers))
        topic, key = self._topics.images_indexed, image_id.encode("utf-8", "replace")
        return Finished(record, (Outgoing(topic, key, encode(event), headers),))

    def refused(self, record: Record, refusal: Refusal) -> Finished:
        """The record can never succeed: its dead letter."""
        log.warning(
            "image refused",
            image_id=salvage_id(record.value, content_type_of(record.headers), "image_id"),
            trace_id=trace_id_of(record.headers),
            offset=record.offset,
            code=refusal.code,
            error=refusal.message,
        )
        letter = self._dead_letters.of(
            record,
            error_class=refusal.error_class,
            code=refusal.code,
            message=refusal.message,
            attempts=refusal.attempts,
        )
        return Finished(record, (letter,))

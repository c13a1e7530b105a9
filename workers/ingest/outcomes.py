"""Reads image events and writes what comes of them: `images.indexed` and dead letters.

The bridge between the wire contract and the job; decides nothing about when.
"""

from __future__ import annotations

import numpy as np
import structlog
from numpy.typing import NDArray

from protocols.blob import BlobLayout
from protocols.encoding import CONTENT_TYPE_HEADER, JSON, EventError, content_type_of, decode, encode
from protocols.events import ImageIndexed, ImageNew
from protocols.salvage import salvage_id
from protocols.topics import Topics
from workers.dead_letters import DeadLetters
from workers.ingest.spans import IngestSpans
from workers.ingest.stages import Refusal
from workers.ingest.state import ImageInWork
from workers.metrics import Metrics, Outcome
from workers.ports import Finished, Outgoing, Record
from workers.telemetry.tracer import MessageTrace

log = structlog.get_logger(__name__)


class IngestOutcomes:
    """Writes outcomes for one model. `images.indexed` is JSON whatever the event was: others read it too."""

    def __init__(
        self,
        *,
        topics: Topics,
        layout: BlobLayout,
        dead_letters: DeadLetters,
        publish_embedding: bool,
        metrics: Metrics,
        spans: IngestSpans,
    ) -> None:
        self._topics = topics
        self._layout = layout
        self._dead_letters = dead_letters
        self._publish_embedding = publish_embedding
        self._metrics = metrics
        self._spans = spans

    def read(self, record: Record) -> ImageNew | Refusal:
        """Decode an event."""
        try:
            return decode(ImageNew, record.value or b"", content_type_of(record.headers))
        except EventError as error:
            return Refusal(type(error).__name__, error.code, str(error))

    def indexed(
        self, image: ImageInWork, now: float, *, skipped: bool, embedding: NDArray[np.float32] | None
    ) -> Finished:
        """The image's blob is in the store; `skipped` if it was there already, and then nothing was encoded."""
        event = ImageIndexed(
            image_id=image.image_id,
            model=self._layout.model_digest,
            num_tokens=self._layout.num_tokens,
            dtype=self._layout.storage,
            num_bytes=self._layout.blob_bytes,
            content_sha256=image.sha256.hex(),
            timings_ms={stage: round(interval.seconds * 1000, 3) for stage, interval in image.stages.items()},
            skipped=skipped,
            embedding=embedding.tolist() if embedding is not None and self._publish_embedding else None,
        )
        status: Outcome = "skipped" if skipped else "ok"
        self._metrics.count_event(status)
        self._spans.ended(image, now, status)
        trace_headers, span = image.trace.outgoing()
        headers = ((CONTENT_TYPE_HEADER, JSON.encode()), *trace_headers)
        topic, key = self._topics.images_indexed, image.image_id.encode("utf-8", "replace")
        return Finished(image.record, (Outgoing(topic, key, encode(event), headers, span=span),), image.trace.span)

    def refused(self, image: ImageInWork, refusal: Refusal, now: float) -> Finished:
        """The image can never be stored: its dead letter."""
        self._spans.ended(image, now, "dead_letter", error=refusal.code)
        return self._dead_letter(image.record, image.trace, image.image_id, refusal)

    def unreadable(self, record: Record, trace: MessageTrace, refusal: Refusal, now: float) -> Finished:
        """The record is no event: its dead letter."""
        image_id = salvage_id(record.value, record.key, "image_id")
        self._spans.unreadable(record, trace, image_id, now, error=refusal.code)
        return self._dead_letter(record, trace, image_id, refusal)

    def _dead_letter(self, record: Record, trace: MessageTrace, image_id: str | None, refusal: Refusal) -> Finished:
        log.warning(
            "image refused",
            image_id=image_id,
            trace_id=trace.trace_id,
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
        return Finished(record, (letter,), trace.span)

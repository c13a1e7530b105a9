"""Reads image events and writes their outcomes: `images.indexed`, its tombstones, and dead letters.

Translates between the wire contract and the job; decides nothing about timing.
"""

from __future__ import annotations

from typing import Literal

import structlog
from pydantic import TypeAdapter, ValidationError

from protocols.blob import BlobLayout
from protocols.encoding import CONTENT_TYPE_HEADER, JSON, EventError, content_type_of, decode, encode
from protocols.events import ImageIndexed, ImageNew
from protocols.fields import Id
from protocols.salvage import salvage_id
from protocols.topics import Topics
from workers.dead_letters import DeadLetters
from workers.errors import Poison
from workers.ingest.spans import IngestSpans
from workers.ingest.work import ImageWork
from workers.metrics import Metrics
from workers.ports import Finished, Outgoing, Record
from workers.telemetry.tracer import MessageTrace

log = structlog.get_logger(__name__)

#: Most lists and maps in an event; valid events have two.
_MAX_CONTAINERS = 1_000
_ID: TypeAdapter[str] = TypeAdapter(Id)


class IngestOutcomes:
    """Writes outcomes for one model. `images.indexed` is always JSON: other programs read it too."""

    def __init__(
        self,
        *,
        topics: Topics,
        layout: BlobLayout,
        dead_letters: DeadLetters,
        publish_embedding: bool,
        max_event_bytes: int,
        metrics: Metrics,
        spans: IngestSpans,
    ) -> None:
        self._topics = topics
        self._layout = layout
        self._dead_letters = dead_letters
        self._max_event_bytes = max_event_bytes
        self._metrics = metrics
        self._spans = spans
        self.publishes_embedding = publish_embedding

    def read(self, record: Record) -> ImageNew:
        """Decode an event. Raises `Poison`."""
        try:
            return decode(
                ImageNew,
                record.value,
                content_type_of(record.headers),
                max_bytes=self._max_event_bytes,
                max_containers=_MAX_CONTAINERS,
            )
        except EventError as error:
            raise Poison(error.code, str(error)) from error

    def removed_id(self, record: Record) -> str:
        """Return the id of the image that a tombstone removes. Raises `Poison`."""
        try:
            return _ID.validate_python((record.key or b"").decode())
        except (UnicodeDecodeError, ValidationError):
            sentence = "a record with a null value removes an image, and its key must be the image id"
            raise Poison("invalid_event", sentence) from None

    def indexed(self, image: ImageWork, now: float) -> Finished:
        """Return the outcome of an image whose blob is in the store."""
        embedding = image.embedding if self.publishes_embedding else None
        event = ImageIndexed(
            image_id=image.image_id,
            model=self._layout.model_digest,
            num_tokens=self._layout.num_tokens,
            dtype=self._layout.storage,
            num_bytes=self._layout.blob_bytes,
            content_sha256=image.sha256.hex(),
            timings_ms={stage: round(interval.seconds * 1000, 3) for stage, interval in image.stages.items()},
            skipped=image.is_stored,
            embedding=None if embedding is None else embedding.tolist(),
            metadata=dict(image.metadata) if image.metadata else None,
        )
        return self._published(image, now, "skipped" if image.is_stored else "ok", encode(event))

    def removed(self, image: ImageWork, now: float) -> Finished:
        """Return the outcome of a removal: the tombstone on `images.indexed` removes the image everywhere else."""
        return self._published(image, now, "removed", None)

    def superseded(self, image: ImageWork, now: float) -> Finished:
        """Return an outcome without messages: a later event has stored the image and publishes its outcome."""
        log.info("a later event of the image is already in the store", **_ids(image.record, image.trace))
        self._metrics.count_event("superseded")
        self._spans.ended(image, now, "superseded")
        return Finished(image.record, (), image.trace.span)

    def refused(self, image: ImageWork, error: Poison, now: float) -> Finished:
        """Return the dead letter of an image that can never be stored."""
        self._spans.ended(image, now, "dead_letter", error=error.code)
        return self._dead_letter(image.record, image.trace, image.image_id, error, image.num_attempts)

    def unreadable(self, record: Record, trace: MessageTrace, error: Poison, now: float) -> Finished:
        """Return the dead letter of a record that is no valid event."""
        image_id = salvage_id(record.value, record.key, "image_id")
        self._spans.unreadable(record, trace, image_id, now, error=error.code)
        return self._dead_letter(record, trace, image_id, error, 1)

    def _published(
        self, image: ImageWork, now: float, status: Literal["ok", "skipped", "removed"], value: bytes | None
    ) -> Finished:
        self._metrics.count_event(status)
        self._spans.ended(image, now, status)
        trace_headers, span = image.trace.outgoing()
        headers = trace_headers if value is None else ((CONTENT_TYPE_HEADER, JSON.encode()), *trace_headers)
        topic, key = self._topics.images_indexed, image.image_id.encode("utf-8", "replace")
        return Finished(image.record, (Outgoing(topic, key, value, headers, span=span),), image.trace.span)

    def _dead_letter(
        self, record: Record, trace: MessageTrace, image_id: str | None, error: Poison, num_attempts: int
    ) -> Finished:
        log.warning("image refused", image_id=image_id, code=error.code, error=str(error), **_ids(record, trace))
        letter = self._dead_letters.of(
            record,
            error_class=type(error.__cause__ or error).__name__,
            code=error.code,
            message=str(error),
            attempts=num_attempts,
        )
        return Finished(record, (letter,), trace.span)


def _ids(record: Record, trace: MessageTrace) -> dict[str, object]:
    """Return the fields of a log line about a record."""
    return {"partition": record.partition.number, "offset": record.offset, "trace_id": trace.trace_id}

"""Converts records of `images.indexed` to changes of the index, and reduces a batch to one change per image.

Pure functions over records; knows nothing of databases and threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocols.encoding import EventError, content_type_of, decode
from protocols.events import ImageIndexed
from protocols.fields import MAX_ID_CHARS
from protocols.source_position import SourcePosition
from workers.errors import Poison
from workers.ports import Record


@dataclass(frozen=True, slots=True)
class OtherModel:
    """An event of another model, which has its own index."""

    image_id: str


@dataclass(frozen=True, slots=True)
class EventChange:
    """One event for the index: a removal if `event` is None, else a row; a row without embedding keeps its vector."""

    image_id: str
    position: SourcePosition
    event: ImageIndexed | None


def read_change(record: Record, *, model_digest: str, pooled_dim: int) -> EventChange | OtherModel:
    """Return the change of a record. Raises `Poison` for an invalid event, or an embedding of another width."""
    position = SourcePosition(record.offset, record.timestamp_ms)
    if record.value is None:
        return EventChange(_image_id(record.key), position, None)
    try:
        event = decode(ImageIndexed, record.value, content_type_of(record.headers))
    except EventError as error:
        raise Poison(error.code, str(error)) from error
    if event.model != model_digest:
        return OtherModel(event.image_id)
    if event.embedding is not None and len(event.embedding) != pooled_dim:
        raise Poison(
            "embedding_mismatch",
            f"an embedding of {len(event.embedding)} values; the checkpoint's vision tower gives {pooled_dim}",
        )
    return EventChange(event.image_id, position, event)


def last_of_each(changes: Iterable[EventChange]) -> list[EventChange]:
    """Return the last change of each image, in the order of the last changes."""
    last: dict[str, EventChange] = {}
    for change in changes:
        last.pop(change.image_id, None)
        last[change.image_id] = change
    return list(last.values())


def _image_id(key: bytes | None) -> str:
    try:
        image_id = (key or b"").decode()
    except UnicodeDecodeError as error:
        raise Poison("invalid_event", "the key of a tombstone is not UTF-8") from error
    if not 1 <= len(image_id) <= MAX_ID_CHARS:
        raise Poison("invalid_event", f"the key of a tombstone is the image id: 1 to {MAX_ID_CHARS} characters")
    return image_id

"""Looks up, writes and removes the values of images in the token store, many images in one call.

Blocks until the store answers. Knows the layout of blobs and the order of events; knows nothing of records, threads
or published events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protocols.blob import BlobError, BlobLayout, blob_key, content_sha256_of, encode_blob
from protocols.source_position import SourcePosition, position_of, removal_marker, with_position
from protocols.thumbnail import encode_thumbnail, thumbnail_key, thumbnail_of
from workers.errors import Poison
from workers.ports import Interval, TokenStore
from workers.retrying import Retry

#: The lifetime of a removal marker: longer than any worker can hold an earlier event of the image.
REMOVAL_MARKER_LIFETIME_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to look up in the store."""

    image_id: str
    position: SourcePosition
    sha256: bytes  # of the image file


@dataclass(frozen=True, slots=True)
class Found:
    """The result of looking up one image.

    `stored`: a valid blob of the same content, which now has this position. `superseded`: a value of a later event.
    """

    state: Literal["absent", "stored", "superseded"]
    has_thumbnail: bool


@dataclass(frozen=True, slots=True)
class LookedUp:
    """The results of a look-up, in its order."""

    found: Sequence[Found]
    interval: Interval
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ToWrite:
    """The values to write for one image; `tokens` is None if its blob is stored already."""

    image_id: str
    position: SourcePosition
    sha256: bytes  # of the image file
    tokens: NDArray[np.float32] | None  # (m, d)
    embedding: NDArray[np.float32] | None  # (e,); checked, not written
    thumbnail: bytes | None
    is_dropped: Callable[[], bool]  # called just before the write


WriteOutcome = Poison | Literal["written", "superseded"]


@dataclass(frozen=True, slots=True)
class Written:
    """The results of a write, in its order."""

    outcomes: Sequence[WriteOutcome]
    num_bytes: int
    num_blobs: int
    interval: Interval


class ImageStore:
    """The images of one model in the token store."""

    def __init__(
        self, store: TokenStore, layout: BlobLayout, *, reads: Retry, writes: Retry, clock: Callable[[], float]
    ) -> None:
        """`reads` and `writes` are separate retries, so that they are counted separately."""
        self.layout = layout
        self._store = store
        self._reads = reads
        self._writes = writes
        self._clock = clock

    def stop(self) -> None:
        """Give up every waiting call to the store."""
        self._reads.stop()
        self._writes.stop()

    def look_up(self, wanted: Sequence[Wanted], *, thumbnails: bool) -> LookedUp:
        """Look up valid blobs of these contents and, with `thumbnails`, the images' thumbnails."""
        started = self._clock()
        keys = [self._key(each.image_id) for each in wanted]
        thumbnail_keys = [thumbnail_key(each.image_id) for each in wanted] if thumbnails else []
        values = self._reads("token blobs", lambda: self._store.get_many([*keys, *thumbnail_keys]))
        blobs, small = values[: len(keys)], values[len(keys) :] or [None] * len(keys)
        found = [
            Found(self._state(each, blob), thumbnail_of(thumbnail) is not None)
            for each, blob, thumbnail in zip(wanted, blobs, small, strict=True)
        ]
        self._move(wanted, blobs, found)
        num_bytes = sum(len(value) for value in values if value is not None)
        return LookedUp(found, Interval(started, self._clock()), num_bytes)

    def write(self, items: Sequence[ToWrite]) -> Written:
        """Write the blobs and thumbnails of the images that are not dropped meanwhile."""
        started = self._clock()
        values: list[dict[str, bytes]] = []
        errors: dict[int, Poison] = {}
        for number, item in enumerate(items):
            try:
                values.append(self._values(item))
            except ValueError as error:
                values.append({})
                errors[number] = Poison("tokens_unusable", str(error))
        written = self._writes("token blobs", lambda: self._put(items, values))
        outcomes: list[WriteOutcome] = []
        num_bytes = num_blobs = 0
        for number, (item, each, is_written) in enumerate(zip(items, values, written, strict=True)):
            outcomes.append(errors.get(number, "written" if is_written else "superseded"))
            if is_written and number not in errors:
                num_bytes += sum(map(len, each.values()))
                num_blobs += item.tokens is not None
        return Written(outcomes, num_bytes, num_blobs, Interval(started, self._clock()))

    def remove(self, images: Sequence[tuple[str, SourcePosition]]) -> list[bool]:
        """Replace the values of images by removal markers; returns False for an image that a later event has stored."""
        markers = {
            key: removal_marker(position)
            for image_id, position in images
            for key in (self._key(image_id), thumbnail_key(image_id))
        }
        put = partial(self._store.put_many, markers, lifetime_s=REMOVAL_MARKER_LIFETIME_S)
        written = dict(zip(markers, self._writes("removals", put), strict=True))
        return [written[self._key(image_id)] for image_id, _ in images]

    def _key(self, image_id: str) -> str:
        return blob_key(self.layout.model_digest, image_id)

    def _state(self, wanted: Wanted, blob: bytes | None) -> Literal["absent", "stored", "superseded"]:
        if blob is None:
            return "absent"
        position = position_of(blob)
        if position is not None and not wanted.position.may_replace(position):
            return "superseded"
        try:
            return "stored" if content_sha256_of(self.layout, blob) == wanted.sha256 else "absent"
        except BlobError:
            return "absent"  # a broken blob is replaced

    def _move(self, wanted: Sequence[Wanted], blobs: Sequence[bytes | None], found: list[Found]) -> None:
        """Give stored blobs the position of the later event with the same content.

        Afterwards an event between the two, written late by a former owner, cannot replace the blob.
        """
        moved: dict[str, tuple[int, bytes]] = {}
        for number, (each, blob) in enumerate(zip(wanted, blobs, strict=True)):
            if found[number].state == "stored" and blob is not None and position_of(blob) != each.position:
                moved[self._key(each.image_id)] = (number, with_position(blob, each.position))
        if moved:
            values = {key: value for key, (_, value) in moved.items()}
            written = self._writes("token blobs", lambda: self._store.put_many(values))
            for (number, _), is_written in zip(moved.values(), written, strict=True):
                if not is_written:
                    found[number] = replace(found[number], state="superseded")

    def _values(self, item: ToWrite) -> dict[str, bytes]:
        """Return the values of an image by key. Raises `ValueError`."""
        if item.embedding is not None and not np.isfinite(item.embedding).all():
            raise ValueError("the pooled embedding is not finite")
        values: dict[str, bytes] = {}
        if item.tokens is not None:
            values[self._key(item.image_id)] = encode_blob(self.layout, item.tokens, item.sha256, item.position)
        if item.thumbnail is not None:
            values[thumbnail_key(item.image_id)] = encode_thumbnail(item.thumbnail, item.position)
        return values

    def _put(self, items: Sequence[ToWrite], values: Sequence[dict[str, bytes]]) -> list[bool]:
        """Write the values of images that are not dropped; returns for each image whether its blob is in the store.

        Of two events of one image in `items` the later one is written.
        """
        latest: dict[str, int] = {}
        for number, item in enumerate(items):
            other = latest.get(item.image_id)
            is_later = other is None or item.position.may_replace(items[other].position)
            if is_later and values[number] and not item.is_dropped():
                latest[item.image_id] = number
        chosen = {key: value for number in latest.values() for key, value in values[number].items()}
        written = dict(zip(chosen, self._store.put_many(chosen), strict=True))
        return [
            item.tokens is None or (latest.get(item.image_id) == number and written[self._key(item.image_id)])
            for number, item in enumerate(items)
        ]

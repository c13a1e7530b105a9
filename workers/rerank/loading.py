"""Loads the images of a piece into the token slab: pins present images, fetches the others, decodes them into slots.

Two pieces that miss the same image share one fetch. An image without a usable blob (missing, corrupt, of another
model) is counted, logged and left out of its pieces. Called from the loop's thread only; fetches run elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import structlog
from numpy.typing import NDArray

from protocols.blob import (
    CONTENT_NUMBER_BYTES,
    BlobError,
    BlobLayout,
    BlobMissing,
    blob_keys,
    content_number,
    decode_blobs,
)
from trt.contract import TokenSlab
from workers.errors import WorkerError
from workers.landing import Landing
from workers.metrics import Metrics
from workers.rerank.fetching import Read
from workers.rerank.request import Piece, Request
from workers.rerank.slots import NO_SLOT, SlotTable
from workers.rerank.spans import RerankSpans
from workers.retrying import Stopped

log = structlog.get_logger(__name__)

#: Most requests that one log line names; more may wait for the same image.
MAX_LOGGED_REQUESTS = 4

#: Starts a fetch of the blobs of some keys on another thread.
StartFetch = Callable[[Sequence[str]], "Future[Read]"]


@dataclass(slots=True, eq=False)
class Fetch:
    """Images that are fetched together, their slots, and the pieces that wait for them."""

    images: Sequence[str]
    slots: NDArray[np.int32]
    waiting: list[Piece]


class SlabLoader:
    """Takes pieces and returns each when all its images are in slots or known to be missing."""

    def __init__(
        self,
        *,
        slab: TokenSlab,
        layout: BlobLayout,
        num_slots: int,
        start_fetch: StartFetch,
        landing: Landing,
        metrics: Metrics,
        spans: RerankSpans,
    ) -> None:
        self._slab = slab
        self._layout = layout
        self._table = SlotTable(num_slots)
        self._contents = np.zeros(num_slots, np.uint64)  # `content_number` of each slot's blob, 0 while it is fetched
        self._start_fetch = start_fetch
        self._landing = landing
        self._metrics = metrics
        self._spans = spans
        self._fetch_of: dict[str, Fetch] = {}  # by image, while it is being fetched
        self._ready: list[Piece] = []
        self._failed: list[tuple[Request, Exception]] = []
        self.num_fetching = 0

    def start(self, piece: Piece) -> bool:
        """Pin or fetch the images of a piece. Returns False and changes nothing if there are too few free slots."""
        slots = self._table.pin_present(piece.images)
        absent = [piece.images[number] for number in np.flatnonzero(slots == NO_SLOT).tolist()]
        if len(absent) > self._table.num_available():
            self._table.unpin(slots[slots != NO_SLOT])
            return False
        piece.slots = slots
        for fetch in self._fetches_in_progress(piece.images):
            fetch.waiting.append(piece)
            piece.num_fetches += 1
        if absent:
            self._fetch(piece, absent)
        self._metrics.count_slab_lookups(hits=len(slots) - len(absent), misses=len(absent))
        if piece.num_fetches == 0:
            self._ready.append(piece)
        return True

    def _fetches_in_progress(self, images: Sequence[str]) -> Iterable[Fetch]:
        if not self._fetch_of:
            return ()
        found = {id(fetch): fetch for fetch in map(self._fetch_of.get, images) if fetch is not None}
        return found.values()

    def _fetch(self, piece: Piece, absent: Sequence[str]) -> None:
        reserved = self._table.reserve(absent)
        piece.slots[piece.slots == NO_SLOT] = reserved
        self._contents[reserved] = 0
        fetch = Fetch(absent, reserved, [piece])
        piece.num_fetches += 1
        self._fetch_of.update(dict.fromkeys(absent, fetch))
        self.num_fetching += 1
        future = self._start_fetch(blob_keys(self._layout.model_digest, absent))
        self._landing.watch(future, partial(self._land, fetch), partial(self._fail, fetch))

    def _land(self, fetch: Fetch, read: Read) -> None:
        num_bytes = sum(len(blob) for blob in read.blobs if blob is not None)
        self._metrics.count_blob_bytes(num_bytes)
        self._spans.read(fetch.waiting, read, num_images=len(fetch.images), num_bytes=num_bytes)
        for piece in fetch.waiting:
            piece.read_at = max(piece.read_at, read.interval.ended_at)
        tokens, scales, rows = self._slab.stage(fetch.slots.tolist())
        try:
            errors = decode_blobs(self._layout, read.blobs, tokens, scales, rows)
        except Exception as error:
            self._fail(fetch, error)
            return
        self._slab.publish(fetch.slots.tolist(), rows)
        self._contents[fetch.slots] = [
            0 if blob is None or error is not None else content_number(self._layout, blob)
            for blob, error in zip(read.blobs, errors, strict=True)
        ]
        bad = {image: error for image, error in zip(fetch.images, errors, strict=True) if error is not None}
        if bad:
            self._report(bad, fetch.waiting)
        self._end(fetch, [number for number, error in enumerate(errors) if error is not None])

    def _fail(self, fetch: Fetch, error: Exception) -> None:
        if isinstance(error, WorkerError | Stopped):
            raise error  # the store refuses this worker, or the worker ends: no request is at fault
        self._failed += [(piece.request, error) for piece in fetch.waiting]
        self._end(fetch, range(len(fetch.images)))

    def _end(self, fetch: Fetch, missing: Sequence[int]) -> None:
        """Free the slots of missing images, and update the waiting pieces."""
        self.num_fetching -= 1
        for image in fetch.images:
            if self._fetch_of.get(image) is fetch:
                del self._fetch_of[image]
        for number in missing:
            self._table.discard(fetch.images[number], int(fetch.slots[number]))
        for piece in fetch.waiting:
            if missing:
                self._leave_out(piece, fetch.slots[list(missing)])
            piece.num_fetches -= 1
            if piece.num_fetches == 0:
                self._ready.append(piece)

    def _leave_out(self, piece: Piece, slots: NDArray[np.int32]) -> None:
        is_missing = np.isin(piece.slots, slots)
        self._table.unpin(piece.slots[is_missing])
        piece.slots[is_missing] = NO_SLOT

    def _report(self, bad: Mapping[str, BlobError], pieces: Sequence[Piece]) -> None:
        reasons = Counter(error.reason for error in bad.values())
        for reason, count in reasons.items():
            self._metrics.count_bad_blobs(reason, count)
        unusable = [(image, error) for image, error in bad.items() if not isinstance(error, BlobMissing)]
        if unusable:
            image, error = unusable[0]
            requests = [piece.request for piece in pieces[:MAX_LOGGED_REQUESTS]]
            log.warning(
                "unusable blobs, treated as missing",
                reasons=dict(reasons),
                image_id=image,
                error=str(error),
                request_ids=[request.request_id for request in requests],
                trace_ids=[request.trace.trace_id for request in requests],
            )

    def take_ready(self) -> list[Piece]:
        """Return the pieces whose last fetch has ended."""
        ready, self._ready = self._ready, []
        return ready

    def take_failed(self) -> list[tuple[Request, Exception]]:
        """Return the requests whose images failed to load, with the unexpected exceptions."""
        failed, self._failed = self._failed, []
        return failed

    def release(self, piece: Piece) -> None:
        """Unpin the slots of a piece that is scored or given up."""
        self._table.unpin(piece.slots[piece.slots != NO_SLOT])
        piece.slots = piece.slots[:0]

    def holds(self, image: str) -> bool:
        """Whether the slab holds this image, or it is being fetched."""
        return image in self._table

    def has_content(self, image: str, content_sha256: bytes) -> bool:
        """Whether the image's slot has the tokens of this content; False while they are being fetched."""
        slot = self._table.slot_of(image)
        return slot != NO_SLOT and int(self._contents[slot]) == int.from_bytes(content_sha256[-CONTENT_NUMBER_BYTES:])

    def invalidate(self, image: str) -> None:
        """Drop the slot of a changed image. Later pieces fetch it again; pieces in work keep the old tokens."""
        self._table.discard(image)
        self._fetch_of.pop(image, None)

    def invalidate_all(self) -> None:
        """Drop the slots of all images."""
        self._table.discard_all()
        self._fetch_of.clear()

    def slots_used(self) -> int:
        return len(self._table)

    def slots_evicted(self) -> int:
        return self._table.num_evicted

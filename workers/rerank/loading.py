"""Brings the images of a piece into the token slab: pins what is there, fetches what is not, decodes into slots.

Two pieces that miss the same image wait for one fetch. What cannot be had (no blob, a corrupt one, one of another
model) is counted, logged and left out; the piece goes on without it. Called from the loop's thread only; the fetches
run elsewhere and end in futures.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import structlog

from protocols.blob import BlobError, BlobLayout, BlobMissing, blob_keys, decode_blobs
from trt.contract import TokenSlab
from workers.metrics import Metrics
from workers.rerank.slots import SlotTable
from workers.rerank.spans import RerankSpans
from workers.rerank.state import Fetch, Piece, Read

log = structlog.get_logger(__name__)

#: Requests that one line of the log names; more can wait for the same image.
MAX_NAMED_REQUESTS = 4

#: Fetches blobs by key somewhere else; the future fails only with what ends the worker.
StartFetch = Callable[[Sequence[str]], "Future[Read]"]


class SlabLoader:
    """Pieces in, pieces with their slots out."""

    def __init__(
        self,
        *,
        slab: TokenSlab,
        layout: BlobLayout,
        num_slots: int,
        start_fetch: StartFetch,
        wake: Callable[[], None],
        metrics: Metrics,
        spans: RerankSpans,
    ) -> None:
        self._slab = slab
        self._layout = layout
        self._table = SlotTable(num_slots)
        self._start_fetch = start_fetch
        self._wake = wake
        self._metrics = metrics
        self._spans = spans
        self._fetch_of: dict[str, Fetch] = {}  # by image, while it is loading
        self._landed: deque[tuple[Fetch, Future[Read]]] = deque()
        self._ready: list[Piece] = []
        self.num_fetching = 0

    def start(self, piece: Piece) -> bool:
        """Pin or fetch the images of a piece; False, and nothing has changed, if there are not enough slots now."""
        slots, absent = self._table.pin_present(piece.images)
        if len(absent) > self._table.num_available():
            self._table.unpin(slot for slot in slots if slot is not None)
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
        found = {id(fetch): fetch for image in images if (fetch := self._fetch_of.get(image)) is not None}
        return found.values()

    def _fetch(self, piece: Piece, absent: list[str]) -> None:
        reserved = self._table.reserve(absent)
        slot_of = dict(zip(absent, reserved, strict=True))
        piece.slots = [
            slot_of[image] if slot is None else slot for image, slot in zip(piece.images, piece.slots, strict=True)
        ]
        fetch = Fetch(absent, reserved, [piece])
        piece.num_fetches += 1
        self._fetch_of.update(dict.fromkeys(absent, fetch))
        self.num_fetching += 1
        future = self._start_fetch(blob_keys(self._layout.model_digest, absent))
        future.add_done_callback(lambda done: self._land(fetch, done))

    def _land(self, fetch: Fetch, done: Future[Read]) -> None:
        # Runs on the fetching thread: hand over and wake, nothing else.
        self._landed.append((fetch, done))
        self._wake()

    def turn(self) -> list[Piece]:
        """Decode what has arrived and return the pieces that wait for nothing more."""
        while self._landed:
            fetch, done = self._landed.popleft()
            self.num_fetching -= 1
            read = done.result()
            num_bytes = sum(len(blob) for blob in read.blobs if blob is not None)
            self._metrics.count_blob_bytes(num_bytes)
            self._spans.read(fetch, read, num_bytes)
            for piece in fetch.waiting:
                piece.read_at = max(piece.read_at, read.interval.ended_at)
            self._decode(fetch, read.blobs)
        ready, self._ready = self._ready, []
        return ready

    def _decode(self, fetch: Fetch, blobs: list[bytes | None]) -> None:
        tokens, scales, rows = self._slab.stage(fetch.slots)
        errors = decode_blobs(self._layout, blobs, tokens, scales, rows)
        self._slab.publish(fetch.slots, rows)
        bad = {image: error for image, error in zip(fetch.images, errors, strict=True) if error is not None}
        for image in fetch.images:
            del self._fetch_of[image]
        if bad:
            self._table.discard(bad)
            self._report(bad, fetch.waiting)
        for piece in fetch.waiting:
            if bad:
                self._leave_out(piece, bad)
            piece.num_fetches -= 1
            if piece.num_fetches == 0:
                self._ready.append(piece)

    def _leave_out(self, piece: Piece, bad: Iterable[str]) -> None:
        gone = set(bad)
        for number, image in enumerate(piece.images):
            slot = piece.slots[number]
            if image in gone and slot is not None:
                self._table.unpin([slot])
                piece.slots[number] = None

    def _report(self, bad: dict[str, BlobError], pieces: Sequence[Piece]) -> None:
        reasons = Counter(error.reason for error in bad.values())
        for reason, count in reasons.items():
            self._metrics.count_bad_blobs(reason, count)
        unusable = [(image, error) for image, error in bad.items() if not isinstance(error, BlobMissing)]
        if unusable:
            image, error = unusable[0]
            log.warning(
                "unusable blobs, treated as missing",
                reasons=dict(reasons),
                image_id=image,
                error=str(error),
                request_ids=[piece.request.plan.request_id for piece in pieces[:MAX_NAMED_REQUESTS]],
                trace_ids=[piece.request.trace.trace_id for piece in pieces[:MAX_NAMED_REQUESTS]],
            )

    def release(self, piece: Piece) -> None:
        """The piece is scored or given up: its slots may be taken for other images."""
        self._table.unpin(slot for slot in piece.slots if slot is not None)
        piece.slots = [None] * len(piece.slots)

    def slots_used(self) -> int:
        return len(self._table)

    def slots_evicted(self) -> int:
        return self._table.num_evicted

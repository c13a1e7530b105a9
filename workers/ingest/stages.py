"""Runs the stages of an image on other threads: fetch, look-up, decode, encode, write.

Each stage may wait on its thread; its result lands on the loop's thread (`workers.landing`). An error of one image
is passed to `failed`; an error of the engine is raised by `land` and ends the worker. Knows nothing of records,
their order or the published events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edje.images import THUMBNAIL_SIDE, ImageError, ImageLimits, open_image
from protocols.source_position import SourcePosition
from trt.contract import ImageEncoder
from workers.errors import Misconfigured, Poison
from workers.ingest.addresses import ImageAddress
from workers.ingest.image_store import ImageStore, LookedUp, ToWrite, Wanted, Written
from workers.landing import Landing
from workers.ports import Interval

Failed = Callable[[Exception], None]


class Fetcher(Protocol):
    """Reads the bytes at an address (`workers.ingest.fetch.ImageFetcher`)."""

    def start(self, address: ImageAddress) -> Future[bytes]:
        """Start reading; the future fails with `Poison` or `Transient`."""
        ...

    def close(self) -> None:
        """Cancel the fetches under way."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image's pixels for the engine, and its thumbnail; each None if not requested."""

    pixels: NDArray[np.uint8] | None  # (3, size, size)
    thumbnail: bytes | None
    interval: Interval


@dataclass(frozen=True, slots=True)
class Encoded:
    """The engine's results for a batch, in the batch's order."""

    tokens: NDArray[np.float32]  # (n, m, d)
    embeddings: NDArray[np.float32]  # (n, e)
    interval: Interval


class IngestStages:
    """Starts the stages on their threads; their results arrive in `land`, on the loop's thread."""

    def __init__(
        self,
        *,
        engine: ImageEncoder,
        images: ImageStore,
        fetcher: Fetcher,
        image_limits: ImageLimits,
        decode_threads: int,
        makes_thumbnails: bool,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """Raises `Misconfigured` if the engine's tokens do not fit the blob layout."""
        info, layout = engine.info, images.layout
        made, expected = (info.num_visual_tokens, info.token_dim), (layout.num_tokens, layout.token_dim)
        if made != expected or info.model_digest != layout.model_digest:
            raise Misconfigured(f"the engine makes {made} tokens by model {info.model_digest}, the blobs are {layout}")
        self._engine = engine
        self._images = images
        self._fetcher = fetcher
        self._image_limits = image_limits
        self.makes_thumbnails = makes_thumbnails
        self._clock = clock
        self._landing = Landing(wake)
        self._decoding = ThreadPoolExecutor(decode_threads, thread_name_prefix="image-decode")
        self._on_engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        # Separate executors, so that no look-up waits for the write of a large batch. One thread writes, so that the
        # results land in the order of the writes.
        self._looking_up = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="store-write")

    def fetch(self, address: ImageAddress, then: Callable[[bytes], None], failed: Failed) -> None:
        """Read the bytes at an address, in one attempt."""
        self._landing.watch(self._fetcher.start(address), then, failed)

    def digest(self, data: bytes, then: Callable[[bytes], None], failed: Failed) -> None:
        """Compute the SHA-256 of an image file."""
        self._landing.start(self._decoding, lambda: hashlib.sha256(data).digest(), then, failed)

    def look_up(self, wanted: Sequence[Wanted], then: Callable[[LookedUp], None], failed: Failed) -> None:
        """Look up valid blobs of these contents, retrying until the store answers."""
        task = partial(self._images.look_up, wanted, thumbnails=self.makes_thumbnails)
        self._landing.start(self._looking_up, task, then, failed)

    def decode(
        self, data: bytes, then: Callable[[Decoded], None], failed: Failed, *, pixels: bool, thumbnail: bool
    ) -> None:
        """Decode an image file to pixels, to a thumbnail, or to both."""
        task = partial(self._decode, data, pixels=pixels, thumbnail=thumbnail)
        self._landing.start(self._decoding, task, then, failed)

    def encode(self, pixels: Sequence[NDArray[np.uint8]], then: Callable[[Encoded], None]) -> None:
        """Run a batch on the engine, after the batches before it."""
        self._landing.start(self._on_engine, lambda: self._encode(pixels), then)

    def write(self, items: Sequence[ToWrite], then: Callable[[Written], None], failed: Failed) -> None:
        """Write the values of a batch in one call, retrying until the store has them."""
        self._landing.start(self._writing, lambda: self._images.write(items), then, failed)

    def remove(
        self, images: Sequence[tuple[str, SourcePosition]], then: Callable[[list[bool]], None], failed: Failed
    ) -> None:
        """Remove images from the store; the result is False for an image that a later event has stored."""
        self._landing.start(self._writing, lambda: self._images.remove(images), then, failed)

    def land(self) -> None:
        """Run the callbacks of all results that have arrived. Raises what the engine raised."""
        self._landing.turn()

    def close(self) -> None:
        """Cancel waiting tasks, let the engine finish its batch, and end the threads."""
        self._images.stop()
        self._fetcher.close()
        for pool in (self._decoding, self._looking_up, self._on_engine, self._writing):
            pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, data: bytes, *, pixels: bool, thumbnail: bool) -> Decoded:
        started, info = self._clock(), self._engine.info
        square = small = opened = None
        try:
            if pixels:
                opened = open_image(data, self._image_limits, min_side=info.image_size)
                square = opened.square(info.image_size, info.resample)
            if thumbnail:
                # Opened once for pixels and thumbnail only if that does not change the pixels.
                if opened is None or info.image_size < THUMBNAIL_SIDE:
                    opened = open_image(data, self._image_limits, min_side=THUMBNAIL_SIDE)
                small = opened.thumbnail()
        except ImageError as error:
            raise Poison(error.code, str(error)) from error
        return Decoded(square, small, Interval(started, self._clock()))

    def _encode(self, pixels: Sequence[NDArray[np.uint8]]) -> Encoded:
        started = self._clock()
        tokens, embeddings = self._engine.encode_images(np.stack(pixels))
        return Encoded(tokens, embeddings, Interval(started, self._clock()))

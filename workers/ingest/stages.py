"""What an image goes through on other threads than the loop's: fetch, look-up, decode, encode, write.

Each stage takes what it needs, waits as long as it must, and hands its result to the loop's thread. What is wrong
with an image is a result (`Refusal`); what is raised has no remedy here and ends the worker. Knows nothing of records,
of their order and of what is published.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tenacity import stop_after_attempt

from edje.images import ImageError, ImageLimits, decode_image
from protocols.blob import BlobError, BlobLayout, blob_key, content_sha256_of, encode_blob
from trt.contract import ImageEncoder
from workers.errors import Misconfigured, Poison, Transient
from workers.ports import Interval, TokenStore
from workers.retrying import Retry

R = TypeVar("R")


class Fetcher(Protocol):
    """Reads the bytes behind an address (`workers.ingest.fetch.ImageFetcher`)."""

    def fetch(self, uri: str) -> bytes:
        """Raises `Poison` or `Transient`."""
        ...

    def close(self) -> None:
        """End the fetches under way."""
        ...


@dataclass(frozen=True, slots=True)
class IngestRetries:
    """One for each thing that may be away, so that each is counted by its own name."""

    fetch: Retry
    store_read: Retry
    store_write: Retry


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an image will never be stored."""

    error_class: str
    code: str
    message: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of an image file."""

    data: bytes
    sha256: bytes
    interval: Interval | None = None  # of its fetch; None where it came with the event


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image as the engine takes it."""

    pixels: NDArray[np.uint8]  # (3, size, size)
    interval: Interval


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the engine made of a batch, in its order."""

    tokens: NDArray[np.float32]  # (n, m, d)
    embeddings: NDArray[np.float32]  # (n, e)
    interval: Interval


@dataclass(frozen=True, slots=True)
class LookedUp:
    """Which images of a look-up the store has in a good blob of this very content, in its order."""

    are_stored: list[bool]
    interval: Interval
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """The blobs of a batch are in the store, but for those that were refused; in its order."""

    refusals: Sequence[Refusal | None]
    num_bytes: int
    num_blobs: int
    interval: Interval


class IngestStages:
    """Starts the stages on their threads; results come out of `land`, on the loop's thread."""

    def __init__(
        self,
        *,
        engine: ImageEncoder,
        store: TokenStore,
        fetcher: Fetcher,
        layout: BlobLayout,
        image_limits: ImageLimits,
        fetch_attempts: int,
        fetch_threads: int,
        decode_threads: int,
        retries: IngestRetries,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        info = engine.info
        made, expected = (info.num_visual_tokens, info.token_dim), (layout.num_tokens, layout.token_dim)
        if made != expected or info.model_digest != layout.model_digest:
            raise Misconfigured(f"the engine makes {made} tokens by model {info.model_digest}, the blobs are {layout}")
        self._engine = engine
        self._image_size = info.image_size
        self._resample = info.resample
        self._store = store
        self._fetcher = fetcher
        self._layout = layout
        self._image_limits = image_limits
        self._fetch_attempts = fetch_attempts
        self._retries = retries
        self._wake = wake
        self._clock = clock
        self._landed: deque[Callable[[], None]] = deque()
        self._fetching = ThreadPoolExecutor(fetch_threads, thread_name_prefix="image-fetch")
        self._decoding = ThreadPoolExecutor(decode_threads, thread_name_prefix="image-decode")
        self._on_engine = ThreadPoolExecutor(1, thread_name_prefix="engine")
        # Apart, so that a look-up does not wait behind the write of a large batch.
        self._looking_up = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="store-write")

    def fetch(self, uri: str, then: Callable[[Content | Refusal], None]) -> None:
        """Read the bytes behind an address, within a bounded number of attempts."""
        self._start(self._fetching, lambda: self._fetch(uri), then)

    def digest(self, data: bytes, then: Callable[[Content], None]) -> None:
        """Name bytes that came with the event. Not behind the fetches, which may wait for strangers."""
        self._start(self._decoding, lambda: Content(data, hashlib.sha256(data).digest()), then)

    def look_up(self, image_ids: Sequence[str], sha256s: Sequence[bytes], then: Callable[[LookedUp], None]) -> None:
        """Ask the store, until it answers, which of these images it has in a good blob of this very content."""
        self._start(self._looking_up, lambda: self._are_stored(image_ids, sha256s), then)

    def decode(self, data: bytes, then: Callable[[Decoded | Refusal], None]) -> None:
        self._start(self._decoding, lambda: self._decode(data), then)

    def encode(self, pixels: Sequence[NDArray[np.uint8]], then: Callable[[Encoded], None]) -> None:
        """Run a batch on the engine, one after the other."""
        self._start(self._on_engine, lambda: self._encode(pixels), then)

    def write(
        self, image_ids: Sequence[str], sha256s: Sequence[bytes], encoded: Encoded, then: Callable[[Written], None]
    ) -> None:
        """Write the blobs of a batch in one call, until the store has them."""
        self._start(self._writing, lambda: self._write(image_ids, sha256s, encoded), then)

    def land(self) -> None:
        """Hand over every result that has arrived. Raises what a stage raised."""
        while self._landed:
            self._landed.popleft()()

    def close(self) -> None:
        """Give up what waits, let the engine finish its batch, and end the threads."""
        for retry in (self._retries.fetch, self._retries.store_read, self._retries.store_write):
            retry.stop()
        self._fetcher.close()
        for pool in (self._fetching, self._decoding, self._looking_up, self._on_engine, self._writing):
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, task: Callable[[], R], then: Callable[[R], None]) -> None:
        def arrived(future: Future[R]) -> None:
            # Runs on the stage's thread: hand over and wake, nothing else.
            self._landed.append(lambda: then(future.result()))
            self._wake()

        pool.submit(task).add_done_callback(arrived)

    def _fetch(self, uri: str) -> Content | Refusal:
        num_attempts = 0

        def attempt() -> bytes:
            nonlocal num_attempts
            num_attempts += 1
            return self._fetcher.fetch(uri)

        started = self._clock()
        try:
            data = self._retries.fetch("image", attempt, stop=stop_after_attempt(self._fetch_attempts))
        except Poison as error:
            return Refusal(type(error).__name__, error.code, str(error), num_attempts)
        except Transient as error:
            return Refusal(type(error).__name__, "image_unavailable", str(error), num_attempts)
        return Content(data, hashlib.sha256(data).digest(), Interval(started, self._clock()))

    def _are_stored(self, image_ids: Sequence[str], sha256s: Sequence[bytes]) -> LookedUp:
        started = self._clock()
        keys = [blob_key(self._layout.model_digest, image_id) for image_id in image_ids]
        blobs = self._retries.store_read("token blobs", lambda: self._store.get_many(keys))
        are_stored = [self._is_same(blob, sha256) for blob, sha256 in zip(blobs, sha256s, strict=True)]
        num_bytes = sum(len(blob) for blob in blobs if blob is not None)
        return LookedUp(are_stored, Interval(started, self._clock()), num_bytes)

    def _is_same(self, blob: bytes | None, sha256: bytes) -> bool:
        if blob is None:
            return False
        try:
            return content_sha256_of(self._layout, blob) == sha256
        except BlobError:
            return False  # to be written anew

    def _decode(self, data: bytes) -> Decoded | Refusal:
        started = self._clock()
        try:
            pixels = decode_image(data, self._image_size, self._image_limits, self._resample)
        except ImageError as error:
            return Refusal(type(error).__name__, error.code, str(error))
        return Decoded(pixels, Interval(started, self._clock()))

    def _encode(self, pixels: Sequence[NDArray[np.uint8]]) -> Encoded:
        started = self._clock()
        tokens, embeddings = self._engine.encode_images(np.stack(pixels))
        return Encoded(tokens, embeddings, Interval(started, self._clock()))

    def _write(self, image_ids: Sequence[str], sha256s: Sequence[bytes], encoded: Encoded) -> Written:
        started = self._clock()
        blobs: dict[str, bytes] = {}
        refusals: list[Refusal | None] = []
        for image_id, sha256, tokens, embedding in zip(
            image_ids, sha256s, encoded.tokens, encoded.embeddings, strict=True
        ):
            try:
                if not np.isfinite(embedding).all():
                    raise ValueError("the pooled embedding is not finite")
                blobs[blob_key(self._layout.model_digest, image_id)] = encode_blob(self._layout, tokens, sha256)
            except ValueError as error:
                refusals.append(Refusal(type(error).__name__, "tokens_unusable", str(error)))
            else:
                refusals.append(None)
        if blobs:
            self._retries.store_write("token blobs", lambda: self._store.put_many(blobs))
        num_bytes = sum(map(len, blobs.values()))
        return Written(refusals, num_bytes, len(blobs), Interval(started, self._clock()))

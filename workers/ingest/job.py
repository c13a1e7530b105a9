"""Takes image events through fetch, look-up, decode, encode and write, each to its one outcome.

Decides what is started when: within the bounds of what is in work, in batches where that pays, and for one image id
strictly in the order of arrival, so that the later content stays. Implements `workers.ports.Job`; what waits does so in
`IngestStages`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from functools import partial

import numpy as np
from numpy.typing import NDArray

from workers.errors import Poison
from workers.ingest.image_batcher import ImageBatcher
from workers.ingest.outcomes import IngestOutcomes
from workers.ingest.spans import IngestSpans
from workers.ingest.stages import Content, Decoded, Encoded, IngestStages, LookedUp, Refusal, Written
from workers.ingest.state import ImageInWork, IngestLimits
from workers.metrics import IngestStage, Metrics
from workers.ports import Finished, Interval, Partition, Record, SpanIds

#: One batch on the engine and one stacked behind it, so that the engine does not wait for the loop between two.
_MAX_BATCHES = 2
#: Blobs read in one look-up: they are whole, because what is broken must not count as stored. A few megabytes.
_MAX_LOOKUPS = 64


class IngestJob:
    """Image events in, `images.indexed` or dead letters out."""

    def __init__(
        self,
        *,
        stages: IngestStages,
        batcher: ImageBatcher[ImageInWork],
        outcomes: IngestOutcomes,
        limits: IngestLimits,
        metrics: Metrics,
        spans: IngestSpans,
    ) -> None:
        self._stages = stages
        self._batcher = batcher
        self._outcomes = outcomes
        self._limits = limits
        self._metrics = metrics
        self._spans = spans
        self._active: dict[tuple[Partition, int], ImageInWork] = {}
        self._behind: dict[str, deque[ImageInWork]] = {}  # by image id in work: the later events of the same id
        self._to_fetch: deque[tuple[str, ImageInWork]] = deque()
        self._to_look_up: deque[ImageInWork] = deque()
        self._is_looking_up = False
        self._finished: list[Finished] = []
        self._num_in_work = 0  # active ones, and dropped ones that some stage still holds
        self._num_bytes = 0
        self._num_fetching = 0
        self._num_before_batcher = 0
        self._num_batches = 0
        self._now = 0.0

    def has_room(self) -> bool:
        return (
            self._num_in_work < self._limits.max_inflight_images and self._num_bytes < self._limits.max_inflight_bytes
        )

    def num_active(self) -> int:
        return len(self._active)

    def accept(self, record: Record, now: float) -> None:
        self._now = now
        trace = self._spans.bus.begin(record)
        event = self._outcomes.read(record)
        if isinstance(event, Refusal):
            self._finished.append(self._outcomes.unreadable(record, trace, event, now))
            return
        image = ImageInWork(record, trace, now, event.image_id, event.uri, data=event.data or b"")
        self._active[record.partition, record.offset] = image
        self._num_in_work += 1
        self._hold(image)
        behind = self._behind.get(image.image_id)
        if behind is None:
            self._behind[image.image_id] = deque()
            self._begin(image)
        else:
            behind.append(image)

    def refuse(self, record: Record, error: Poison, now: float) -> None:
        image = self._active.pop((record.partition, record.offset), None)
        if image is not None:
            image.is_dropped = True
        trace = image.trace if image is not None else self._spans.bus.begin(record)
        refusal = Refusal(type(error.__cause__ or error).__name__, error.code, str(error))
        self._finished.append(self._outcomes.unreadable(record, trace, refusal, now))

    def turn(self, now: float) -> list[Finished]:
        self._now = now
        self._stages.land()
        self._start_fetches()
        self._start_look_up()
        self._start_batches()
        self._metrics.inflight_bytes.set(self._num_bytes)
        finished, self._finished = self._finished, []
        return finished

    def wants_turn_in_s(self, now: float) -> float | None:
        if self._finished or self._can_fetch():
            return 0.0
        return self._batcher.wants_turn_in_s(now) if self._num_batches < _MAX_BATCHES else None

    def drop(self, partitions: Collection[Partition]) -> None:
        # Where an image is held by a stage it ends when that does: until then a newer event of its id must wait,
        # for the blob that is being written may still arrive.
        for key, image in list(self._active.items()):
            if key[0] in partitions:
                image.is_dropped = True
                del self._active[key]
        self._finished = [done for done in self._finished if done.record.partition not in partitions]

    def close(self) -> None:
        """End the stages' threads; what is in work is the next owner's."""
        self._stages.close()

    def _begin(self, image: ImageInWork) -> None:
        self._num_before_batcher += 1
        if image.uri is None:
            self._stages.digest(image.data, partial(self._has_content, image))
        else:
            self._to_fetch.append((image.uri, image))

    def _can_fetch(self) -> bool:
        """Whether the next image may be fetched: it could be as large as any may be, but one is always under way."""
        if not self._to_fetch or self._num_fetching >= self._limits.fetch_threads:
            return False
        set_aside = (self._num_fetching + 1) * self._limits.max_image_bytes
        return self._num_fetching == 0 or self._num_bytes + set_aside <= self._limits.max_inflight_bytes

    def _start_fetches(self) -> None:
        while self._can_fetch():
            uri, image = self._to_fetch.popleft()
            if image.is_dropped:
                self._end_before_batcher(image)
                continue
            self._num_fetching += 1
            self._stages.fetch(uri, partial(self._fetched, image))

    def _fetched(self, image: ImageInWork, content: Content | Refusal) -> None:
        self._num_fetching -= 1
        if isinstance(content, Content) and content.interval is not None:
            self._time(image, "fetch", content.interval)
        self._has_content(image, content)

    def _has_content(self, image: ImageInWork, content: Content | Refusal) -> None:
        if image.is_dropped or isinstance(content, Refusal):
            self._end_before_batcher(image, None if isinstance(content, Content) else content)
            return
        image.data, image.sha256 = content.data, content.sha256
        self._hold(image)
        self._to_look_up.append(image)

    def _start_look_up(self) -> None:
        """One look-up at a time: what arrives meanwhile goes together into the next."""
        if self._is_looking_up or not self._to_look_up:
            return
        images = [self._to_look_up.popleft() for _ in range(min(len(self._to_look_up), _MAX_LOOKUPS))]
        self._is_looking_up = True
        self._stages.look_up(
            [image.image_id for image in images],
            [image.sha256 for image in images],
            partial(self._looked_up, images),
        )

    def _looked_up(self, images: list[ImageInWork], found: LookedUp) -> None:
        self._is_looking_up = False
        self._spans.looked_up(images, found.interval, found.num_bytes)
        for image, is_stored in zip(images, found.are_stored, strict=True):
            self._time(image, "look_up", found.interval)
            if image.is_dropped:
                self._end_before_batcher(image)
            elif is_stored:
                self._num_before_batcher -= 1
                self._index(image, skipped=True, embedding=None)
            else:
                self._stages.decode(image.data, partial(self._decoded, image))

    def _decoded(self, image: ImageInWork, decoded: Decoded | Refusal) -> None:
        if image.is_dropped or isinstance(decoded, Refusal):
            self._end_before_batcher(image, None if isinstance(decoded, Decoded) else decoded)
            return
        self._time(image, "decode", decoded.interval)
        self._num_before_batcher -= 1
        image.data, image.pixels = b"", decoded.pixels
        self._hold(image)
        self._batcher.add(image, self._now)

    def _start_batches(self) -> None:
        while self._num_batches < _MAX_BATCHES:
            batch = self._batcher.take(self._now, more_is_coming=self._num_before_batcher > 0)
            if not batch:
                return
            images = []
            for image in batch:
                if image.is_dropped:
                    self._end(image)
                else:
                    images.append(image)
            if images:
                self._num_batches += 1
                pixels = [image.pixels for image in images if image.pixels is not None]
                self._stages.encode(pixels, partial(self._encoded, images))

    def _encoded(self, images: list[ImageInWork], encoded: Encoded) -> None:
        self._num_batches -= 1
        self._metrics.batch_images.observe(len(images))
        for image in images:
            image.pixels = None
            self._hold(image)
            self._time(image, "encode", encoded.interval)
        batch = self._spans.encoded(images, encoded.interval)
        self._stages.write(
            [image.image_id for image in images],
            [image.sha256 for image in images],
            encoded,
            partial(self._written, images, encoded.embeddings, batch),
        )

    def _written(
        self, images: list[ImageInWork], embeddings: NDArray[np.float32], batch: SpanIds | None, written: Written
    ) -> None:
        self._spans.written(batch, written.interval, written.num_blobs)
        self._metrics.store_write_bytes.inc(written.num_bytes)
        for image, embedding, refusal in zip(images, embeddings, written.refusals, strict=True):
            self._time(image, "store", written.interval)
            if image.is_dropped:
                self._end(image)
            elif refusal is not None:
                self._refuse(image, refusal)
            else:
                self._index(image, skipped=False, embedding=embedding)

    def _time(self, image: ImageInWork, stage: IngestStage, interval: Interval) -> None:
        image.stages[stage] = interval
        self._metrics.observe_image(stage, interval.seconds, image.trace.exemplar())

    def _index(self, image: ImageInWork, *, skipped: bool, embedding: NDArray[np.float32] | None) -> None:
        self._finished.append(self._outcomes.indexed(image, self._now, skipped=skipped, embedding=embedding))
        self._end(image)

    def _refuse(self, image: ImageInWork, refusal: Refusal) -> None:
        self._finished.append(self._outcomes.refused(image, refusal, self._now))
        self._end(image)

    def _end_before_batcher(self, image: ImageInWork, refusal: Refusal | None = None) -> None:
        self._num_before_batcher -= 1
        if refusal is None or image.is_dropped:
            self._end(image)
        else:
            self._refuse(image, refusal)

    def _end(self, image: ImageInWork) -> None:
        """The image has its outcome, or is another worker's: let go of it, and begin the next event of its id."""
        key = image.record.partition, image.record.offset
        if self._active.get(key) is image:
            del self._active[key]
        self._num_in_work -= 1
        self._num_bytes -= image.num_bytes
        behind = self._behind[image.image_id]
        while behind:
            following = behind.popleft()
            if not following.is_dropped:
                self._begin(following)
                return
            self._num_in_work -= 1
            self._num_bytes -= following.num_bytes
        del self._behind[image.image_id]

    def _hold(self, image: ImageInWork) -> None:
        """Count the bytes that this image holds now."""
        num_bytes = image.held_bytes()
        self._num_bytes += num_bytes - image.num_bytes
        image.num_bytes = num_bytes

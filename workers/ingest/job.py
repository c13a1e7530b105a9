"""Passes image events through fetch, look-up, decode, encode and write, and gives each its one outcome.

Decides when each stage starts, within the bounds of the work, in batches where that pays. Events of one image may
overtake each other; the store keeps the later one (`protocols.source_position`). Implements `workers.ports.Job`; the
stages run in `IngestStages`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial

from workers.errors import Poison, as_internal_error
from workers.ingest.addresses import parse_address
from workers.ingest.fetching import Fetching
from workers.ingest.image_store import LookedUp, ToWrite, Wanted, Written
from workers.ingest.outcomes import IngestOutcomes
from workers.ingest.scheduling import FetchQueue, ImageBatcher
from workers.ingest.spans import IngestSpans
from workers.ingest.stages import Decoded, Encoded, IngestStages
from workers.ingest.work import ImageWork, IngestLimits
from workers.metrics import IngestStage, Metrics
from workers.ports import Finished, Interval, Partition, Record, SpanIds

#: One batch on the engine and one waiting, so that the engine does not wait for the loop between two batches.
_MAX_BATCHES = 2
#: Blobs read in one look-up, a few megabytes. Read whole, because a broken blob must not count as stored.
_MAX_LOOKUPS = 64
#: Most removals written at once.
_MAX_REMOVALS = 256
#: Most images that wait for a fetch. They hold little memory, so images of a failed host delay no others.
_MAX_WAITING_IMAGES = 10_000


class IngestJob:
    """Image events in, `images.indexed` or dead letters out."""

    def __init__(
        self,
        *,
        stages: IngestStages,
        fetches: FetchQueue[ImageWork],
        batcher: ImageBatcher[ImageWork],
        outcomes: IngestOutcomes,
        limits: IngestLimits,
        metrics: Metrics,
        spans: IngestSpans,
    ) -> None:
        self._stages = stages
        self._fetching = Fetching(
            stages.fetch,
            fetches,
            limits,
            metrics,
            then=self._fetched,
            failed=self._failed,
            dropped=self._end,
        )
        self._batcher = batcher
        self._outcomes = outcomes
        self._limits = limits
        self._metrics = metrics
        self._spans = spans
        self._active: dict[tuple[Partition, int], ImageWork] = {}
        self._to_look_up: deque[ImageWork] = deque()
        self._to_remove: deque[ImageWork] = deque()
        self._num_look_ups = 0
        self._num_removals = 0
        self._finished: list[Finished] = []
        self._num_in_work = 0  # active images, and dropped images that a stage still holds
        self._num_bytes = 0
        self._num_preparing = 0  # images with content that will reach the batcher
        self._num_batches = 0
        self._now = 0.0

    def has_room(self) -> bool:
        num_waiting = self._fetching.num_waiting()
        return (
            self._num_in_work - num_waiting < self._limits.max_inflight_images
            and num_waiting < _MAX_WAITING_IMAGES
            and self._num_bytes < self._limits.max_inflight_bytes
        )

    def num_active(self) -> int:
        return len(self._active)

    def accept(self, record: Record, now: float) -> None:
        self._now = now
        trace = self._spans.bus.begin(record)
        try:
            if record.value is None:
                image = ImageWork(record, trace, now, self._outcomes.removed_id(record))
                self._enter(image)
                self._to_remove.append(image)
                return
            event = self._outcomes.read(record)
        except Poison as error:
            self._finished.append(self._outcomes.unreadable(record, trace, error, now))
            return
        image = ImageWork(record, trace, now, event.image_id, metadata=event.metadata, data=event.data or b"")
        self._enter(image)
        if event.uri is None:
            self._digest(image)
            return
        try:
            self._fetching.add(image, parse_address(event.uri))
        except Exception as error:
            self._failed(image, error)

    def refuse(self, record: Record, error: Poison, now: float) -> None:
        image = self._active.pop((record.partition, record.offset), None)
        if image is not None:
            image.is_dropped = True
            self._fetching.remove_dropped()
        trace = image.trace if image is not None else self._spans.bus.begin(record)
        self._finished.append(self._outcomes.unreadable(record, trace, error, now))

    def turn(self, now: float) -> list[Finished]:
        self._now = now
        self._fetching.turn(now)
        self._stages.land()
        self._fetching.start(now, self._num_bytes)
        self._start_look_up()
        self._start_removals()
        self._start_batches()
        self._metrics.inflight_bytes.set(self._num_bytes)
        finished, self._finished = self._finished, []
        return finished

    def wants_turn_in_s(self, now: float) -> float | None:
        if self._finished:
            return 0.0
        waits = [self._fetching.wants_turn_in_s(now, self._num_bytes)]
        if self._num_batches < _MAX_BATCHES:
            waits.append(self._batcher.wants_turn_in_s(now))
        return min((wait for wait in waits if wait is not None), default=None)

    def drop(self, partitions: Collection[Partition]) -> None:
        # An image in a stage ends with the stage, and writes nothing.
        for key, image in list(self._active.items()):
            if key[0] in partitions:
                image.is_dropped = True
                del self._active[key]
        self._fetching.remove_dropped()
        self._finished = [done for done in self._finished if done.record.partition not in partitions]

    def close(self) -> None:
        """End the stages' threads; images in work are left to the next owner."""
        self._stages.close()

    def _enter(self, image: ImageWork) -> None:
        self._active[image.record.partition, image.record.offset] = image
        self._num_in_work += 1
        self._count_bytes(image)

    # --- fetch, look-up ---

    def _fetched(self, image: ImageWork, data: bytes) -> None:
        self._time(image, "fetch", image.stages["fetch"])
        image.data = data
        self._count_bytes(image)
        self._digest(image)

    def _digest(self, image: ImageWork) -> None:
        self._num_preparing += 1
        self._stages.digest(image.data, partial(self._has_content, image), partial(self._not_prepared, image))

    def _has_content(self, image: ImageWork, sha256: bytes) -> None:
        image.sha256 = sha256
        self._to_look_up.append(image)

    def _start_look_up(self) -> None:
        """Start a look-up unless one is running; images that arrive meanwhile share the next one."""
        if self._num_look_ups == 0 and self._to_look_up:
            self._look_up([self._to_look_up.popleft() for _ in range(min(len(self._to_look_up), _MAX_LOOKUPS))])

    def _look_up(self, images: Sequence[ImageWork]) -> None:
        self._num_look_ups += 1
        wanted = [Wanted(image.image_id, image.position, image.sha256) for image in images]
        self._stages.look_up(wanted, partial(self._looked_up, images), partial(self._look_up_failed, images))

    def _look_up_failed(self, images: Sequence[ImageWork], error: Exception) -> None:
        self._num_look_ups -= 1
        self._isolate(images, error, self._look_up, self._not_prepared)

    def _looked_up(self, images: Sequence[ImageWork], results: LookedUp) -> None:
        self._num_look_ups -= 1
        self._spans.looked_up(images, results.interval, results.num_bytes)
        for image, found in zip(images, results.found, strict=True):
            self._time(image, "look_up", results.interval)
            image.is_stored = found.state == "stored"
            pixels = not image.is_stored or self._outcomes.publishes_embedding
            thumbnail = self._stages.makes_thumbnails and not (image.is_stored and found.has_thumbnail)
            if found.state != "superseded" and not image.is_dropped and (pixels or thumbnail):
                self._stages.decode(
                    image.data,
                    partial(self._decoded, image),
                    partial(self._not_prepared, image),
                    pixels=pixels,
                    thumbnail=thumbnail,
                )
                continue
            self._num_preparing -= 1
            if image.is_dropped:
                self._end(image)
            elif found.state == "superseded":
                self._superseded(image)
            else:
                self._index(image)

    # --- decode, encode ---

    def _decoded(self, image: ImageWork, decoded: Decoded) -> None:
        self._num_preparing -= 1
        self._time(image, "decode", decoded.interval)
        image.data, image.pixels, image.thumbnail = b"", decoded.pixels, decoded.thumbnail
        self._count_bytes(image)
        if image.is_dropped:
            self._end(image)
        elif image.pixels is None:
            self._write(None, [image])  # its blob is stored, but no thumbnail
        else:
            self._batcher.add(image, self._now)

    def _start_batches(self) -> None:
        while self._num_batches < _MAX_BATCHES:
            more_is_coming = self._num_preparing + self._fetching.num_fetching() > 0
            batch = self._batcher.take(self._now, more_is_coming=more_is_coming)
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

    def _encoded(self, images: Sequence[ImageWork], encoded: Encoded) -> None:
        self._num_batches -= 1
        self._metrics.batch_images.observe(len(images))
        for image, tokens, embedding in zip(images, encoded.tokens, encoded.embeddings, strict=True):
            image.pixels, image.tokens, image.embedding = None, tokens, embedding
            self._count_bytes(image)
            self._time(image, "encode", encoded.interval)
        self._write(self._spans.encoded(images, encoded.interval), images)

    # --- write, remove ---

    def _write(self, batch: SpanIds | None, images: Sequence[ImageWork]) -> None:
        items = [
            ToWrite(
                image.image_id,
                image.position,
                image.sha256,
                None if image.is_stored else image.tokens,
                image.embedding,
                image.thumbnail,
                is_dropped=partial(getattr, image, "is_dropped"),
            )
            for image in images
        ]
        self._stages.write(items, partial(self._written, batch, images), partial(self._write_failed, batch, images))

    def _write_failed(self, batch: SpanIds | None, images: Sequence[ImageWork], error: Exception) -> None:
        self._isolate(images, error, partial(self._write, batch), self._failed)

    def _written(self, batch: SpanIds | None, images: Sequence[ImageWork], written: Written) -> None:
        self._spans.written(batch, written.interval, written.num_blobs)
        self._metrics.store_write_bytes.inc(written.num_bytes)
        for image, outcome in zip(images, written.outcomes, strict=True):
            self._time(image, "store", written.interval)
            if image.is_dropped:
                self._end(image)
            elif isinstance(outcome, Poison):
                self._failed(image, outcome)
            elif outcome == "superseded":
                self._superseded(image)
            else:
                self._index(image)

    def _start_removals(self) -> None:
        """Start a call that removes images unless one is running; later removals share the next call."""
        if self._num_removals == 0 and self._to_remove:
            self._remove([self._to_remove.popleft() for _ in range(min(len(self._to_remove), _MAX_REMOVALS))])

    def _remove(self, images: Sequence[ImageWork]) -> None:
        self._num_removals += 1
        removals = [(image.image_id, image.position) for image in images if not image.is_dropped]
        left = [image for image in images if not image.is_dropped]
        for image in images:
            if image.is_dropped:
                self._end(image)
        self._stages.remove(removals, partial(self._removed, left), partial(self._removal_failed, left))

    def _removal_failed(self, images: Sequence[ImageWork], error: Exception) -> None:
        self._num_removals -= 1
        self._isolate(images, error, self._remove, self._failed)

    def _removed(self, images: Sequence[ImageWork], are_removed: Sequence[bool]) -> None:
        self._num_removals -= 1
        for image, is_removed in zip(images, are_removed, strict=True):
            if is_removed and not image.is_dropped:
                self._finished.append(self._outcomes.removed(image, self._now))
                self._end(image)
            elif image.is_dropped:
                self._end(image)
            else:
                self._superseded(image)

    # --- outcomes ---

    def _index(self, image: ImageWork) -> None:
        try:
            finished = self._outcomes.indexed(image, self._now)
        except Exception as error:  # the event cannot be written
            self._failed(image, error)
        else:
            self._finished.append(finished)
            self._end(image)

    def _superseded(self, image: ImageWork) -> None:
        self._finished.append(self._outcomes.superseded(image, self._now))
        self._end(image)

    def _failed(self, image: ImageWork, error: Exception) -> None:
        """Give an image the outcome of its error; an unexpected error fails this image only."""
        if not image.is_dropped:
            partition, offset = image.record.partition.number, image.record.offset
            poison = as_internal_error(error, image_id=image.image_id, partition=partition, offset=offset)
            self._finished.append(self._outcomes.refused(image, poison, self._now))
        self._end(image)

    def _not_prepared(self, image: ImageWork, error: Exception) -> None:
        self._num_preparing -= 1
        self._failed(image, error)

    def _isolate(
        self,
        images: Sequence[ImageWork],
        error: Exception,
        again: Callable[[Sequence[ImageWork]], None],
        failed: Callable[[ImageWork, Exception], None],
    ) -> None:
        """Repeat a failed step for each image alone, to find the image that makes it fail."""
        if len(images) == 1:
            failed(images[0], error)
            return
        for image in images:
            again([image])

    def _end(self, image: ImageWork) -> None:
        """Forget an image that has its outcome, or whose partition another worker owns."""
        key = image.record.partition, image.record.offset
        if self._active.get(key) is image:
            del self._active[key]
        self._num_in_work -= 1
        self._num_bytes -= image.num_bytes

    def _time(self, image: ImageWork, stage: IngestStage, interval: Interval) -> None:
        image.stages[stage] = interval
        self._metrics.observe_image(stage, interval.seconds, image.trace.exemplar())

    def _count_bytes(self, image: ImageWork) -> None:
        """Update the count of bytes in work with the bytes that this image now holds."""
        num_bytes = image.held_bytes()
        self._num_bytes += num_bytes - image.num_bytes
        image.num_bytes = num_bytes

"""Writes `images.indexed` events to the index in batches, and gives each event its one outcome.

One write runs at a time; events that arrive meanwhile form the next batch. The order of an image's events is kept.
Implements `workers.ports.Job`; the writes run on a separate thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import structlog

from workers.dead_letters import DeadLetters
from workers.errors import Poison
from workers.index.changes import EventChange, OtherModel, last_of_each, read_change
from workers.index.spans import IndexSpans
from workers.index.writer import IndexWriter, Written
from workers.landing import Landing
from workers.metrics import Metrics, Outcome
from workers.ports import Finished, Partition, Record
from workers.telemetry.tracer import MessageTrace

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class EventInWork:
    """One event that has no outcome yet."""

    record: Record
    trace: MessageTrace
    taken_at: float
    change: EventChange
    is_dropped: bool = False


class IndexJob:
    """Turns events of `images.indexed` into rows of the index."""

    def __init__(
        self,
        *,
        writer: IndexWriter,
        dead_letters: DeadLetters,
        max_batch_images: int,
        max_inflight_images: int,
        wake: Callable[[], None],
        metrics: Metrics,
        spans: IndexSpans,
    ) -> None:
        self._writer = writer
        self._dead_letters = dead_letters
        self._max_batch_images = max_batch_images
        self._max_inflight_images = max_inflight_images
        self._metrics = metrics
        self._spans = spans
        self._landing = Landing(wake)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="index-write")
        self._waiting: deque[EventInWork] = deque()
        self._writing: list[EventInWork] = []
        self._finished: list[Finished] = []
        self._now = 0.0
        self._reported_missing_vectors = False

    def has_room(self) -> bool:
        return len(self._waiting) + len(self._writing) < self._max_inflight_images

    def num_active(self) -> int:
        return sum(not each.is_dropped for each in (*self._waiting, *self._writing))

    def accept(self, record: Record, now: float) -> None:
        self._now = now
        trace = self._spans.bus.begin(record)
        try:
            change = read_change(record, model_digest=self._writer.model_digest, pooled_dim=self._writer.pooled_dim)
        except Poison as error:
            self._refuse(record, trace, error)
            return
        if isinstance(change, OtherModel):
            self._finish(record, trace, change.image_id, "skipped", now)
            return
        self._waiting.append(EventInWork(record, trace, now, change))

    def refuse(self, record: Record, error: Poison, now: float) -> None:
        self._now = now
        self._waiting = deque(each for each in self._waiting if each.record is not record)
        self._refuse(record, self._spans.bus.begin(record), error)

    def turn(self, now: float) -> list[Finished]:
        self._now = now
        self._landing.turn()
        if not self._writing and self._waiting:
            self._start_write()
        finished, self._finished = self._finished, []
        return finished

    def wants_turn_in_s(self, now: float) -> float | None:
        return 0.0 if self._finished else None

    def drop(self, partitions: Collection[Partition]) -> None:
        self._waiting = deque(each for each in self._waiting if each.record.partition not in partitions)
        for each in self._writing:
            each.is_dropped = each.is_dropped or each.record.partition in partitions
        self._finished = [done for done in self._finished if done.record.partition not in partitions]

    def close(self) -> None:
        """End the writing thread; events in work are left to the next owner."""
        self._writer.stop()
        self._executor.shutdown(cancel_futures=True)

    def _start_write(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch_images))]
        self._writing = batch
        changes = last_of_each(each.change for each in batch)
        self._landing.start(
            self._executor, partial(self._writer.write, changes), partial(self._written, batch, changes)
        )

    def _written(self, batch: Sequence[EventInWork], changes: Sequence[EventChange], written: Written) -> None:
        self._writing = []
        changed = {change.image_id: change for change in changes}
        self._metrics.index_write_seconds.observe(written.interval.seconds)
        self._metrics.batch_images.observe(len(changes))
        self._spans.written([each.trace.span for each in batch if each.trace.span], len(changes), written.interval)
        self._count_without_vector(len(written.without_vector))
        for each in batch:
            if each.is_dropped:
                continue
            image_id = each.change.image_id
            is_last = changed[image_id] is each.change  # else a later event of the batch replaces this one
            if is_last and image_id in written.poisons:
                self._refuse(each.record, each.trace, written.poisons[image_id])
                continue
            outcome: Outcome = "skipped" if is_last and image_id in written.without_vector else "ok"
            self._finish(each.record, each.trace, image_id, outcome, each.taken_at)

    def _count_without_vector(self, number: int) -> None:
        if not number:
            return
        self._metrics.index_without_vector.inc(number)
        if not self._reported_missing_vectors:
            self._reported_missing_vectors = True
            log.warning(
                "images without an embedding are not indexed: set INGEST_PUBLISH_EMBEDDING=true, publish them again",
                images=number,
            )

    def _finish(self, record: Record, trace: MessageTrace, image_id: str, outcome: Outcome, taken_at: float) -> None:
        self._metrics.count_event(outcome)
        self._spans.ended(record, trace, image_id, taken_at, self._now, outcome)
        self._finished.append(Finished(record, (), trace.span))

    def _refuse(self, record: Record, trace: MessageTrace, error: Poison) -> None:
        key = (record.key or b"").decode("utf-8", "replace")
        log.warning(
            "event refused", key=key, offset=record.offset, trace_id=trace.trace_id, code=error.code, error=str(error)
        )
        self._spans.ended(record, trace, key or None, self._now, self._now, "dead_letter", error=error.code)
        letter = self._dead_letters.of(
            record, error_class=type(error.__cause__ or error).__name__, code=error.code, message=str(error)
        )
        self._finished.append(Finished(record, (letter,), trace.span))

"""Queues finished spans without waiting and exports them from a thread; spans are dropped while the queue is full.

Batches follow the OpenTelemetry specification (OTEL_BSP_*). The SDK's queue accepts only its own spans and does not
count dropped ones. Knows no destination by name.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from workers.telemetry.finished_span import FinishedSpan, SpanExporter

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """When spans are sent, and how many may wait."""

    max_spans: int  # waiting, or being sent
    max_batch: int  # in one export; a full batch is sent at once
    delay_s: float  # interval at which smaller batches are sent


class SpanQueue:
    """The queue of one destination; one thread calls `put` and `close`."""

    def __init__(self, exporter: SpanExporter, limits: QueueLimits, count_dropped: Callable[[int], None]) -> None:
        """`count_dropped` is called from both threads."""
        self._exporter = exporter
        self._limits = limits
        self._count_dropped = count_dropped
        self._waiting: deque[FinishedSpan] = deque()
        self._num_put = 0
        self._num_left = 0  # exported or lost; written by the exporting thread only, `_num_put` by the other
        self._wake = threading.Event()
        self._is_closing = False
        self._has_given_up = False
        self._thread = threading.Thread(target=self._run, name="span-queue", daemon=True)
        self._thread.start()

    def put(self, span: FinishedSpan) -> None:
        if self._num_put - self._num_left >= self._limits.max_spans:
            self._count_dropped(1)
            return
        self._num_put += 1
        self._waiting.append(span)
        if len(self._waiting) == self._limits.max_batch:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Export the remaining spans within the timeout; drop and count the others."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._has_given_up = self._thread.is_alive()
        self._exporter.shutdown()  # ends a wait between two attempts
        if self._has_given_up:
            num_lost = self._num_put - self._num_left
            self._count_dropped(num_lost)
            log.warning("spans dropped at the end: their destination did not accept them in time", num_spans=num_lost)

    def _run(self) -> None:
        while not self._is_closing:
            has_enough = self._wake.wait(self._limits.delay_s)
            self._wake.clear()
            while len(self._waiting) >= self._limits.max_batch:
                self._export()
            if not has_enough and self._waiting:
                self._export()
        while self._waiting and not self._has_given_up:
            self._export()

    def _export(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._limits.max_batch))]
        is_taken = False
        try:
            is_taken = self._exporter.export(batch)
        except Exception:
            log.exception("spans not exported", num_spans=len(batch))
        self._num_left += len(batch)
        if not is_taken and not self._has_given_up:
            self._count_dropped(len(batch))

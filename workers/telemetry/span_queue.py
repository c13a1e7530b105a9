"""Takes finished spans without waiting, and exports them from a thread; what finds no room is dropped and counted.

Batches as the OpenTelemetry specification has them (OTEL_BSP_*). Not the SDK's queue: that one takes its own spans only
and drops without a word. Knows no destination by name.
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
    """When spans are sent, and how many wait."""

    max_spans: int  # waiting, or being sent
    max_batch: int  # in one export; so many are sent at once
    delay_s: float  # fewer are sent this often


class SpanQueue:
    """The way to one destination; `put` and `close` are for one thread."""

    def __init__(self, exporter: SpanExporter, limits: QueueLimits, count_dropped: Callable[[int], None]) -> None:
        """`count_dropped` is called from both threads."""
        self._exporter = exporter
        self._limits = limits
        self._count_dropped = count_dropped
        self._waiting: deque[FinishedSpan] = deque()
        self._num_put = 0
        self._num_left = 0  # exported or lost; written by the exporting thread alone, as `_num_put` is by the other
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
        """Export what is left, as far as the time allows; the rest is dropped and counted."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._has_given_up = self._thread.is_alive()
        self._exporter.shutdown()  # ends the wait between two attempts
        if self._has_given_up:
            num_lost = self._num_put - self._num_left
            self._count_dropped(num_lost)
            log.warning("spans are left behind: their destination does not take them", num_spans=num_lost)

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

"""Takes finished spans without waiting, and exports them from a thread; what finds no room is dropped and counted.

The thread and its batches are the SDK's (`BatchSpanProcessor`, set by OTEL_BSP_*); that one drops silently, so room is
kept account of here. Knows no destination by name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from workers.errors import Misconfigured

log = structlog.get_logger(__name__)


class SpanQueue:
    """The way to one destination; `put` is for one thread."""

    def __init__(self, exporter: SpanExporter, *, max_spans: int, count_dropped: Callable[[int], None]) -> None:
        """`count_dropped` is called from both threads. Raises `Misconfigured` for batches larger than the queue."""
        self._exporter = _Accounting(exporter, count_dropped)
        self._max_spans = max_spans
        self._count_dropped = count_dropped
        self._num_put = 0
        try:
            self._processor = BatchSpanProcessor(self._exporter, max_queue_size=max_spans)
        except ValueError as error:
            raise Misconfigured(f"OTEL_BSP_*: {error}") from error

    def put(self, span: ReadableSpan) -> None:
        if self._num_put - self._exporter.num_left >= self._max_spans:
            self._count_dropped(1)
            return
        self._num_put += 1
        self._processor.on_end(span)

    def close(self, timeout_s: float) -> None:
        """Export what is left, as far as the time allows; the rest is dropped and counted."""
        # On a thread of its own, because the SDK waits half a minute for a destination that is away.
        closing = threading.Thread(target=self._processor.shutdown, name="span-queue-close", daemon=True)
        closing.start()
        closing.join(timeout_s)
        if closing.is_alive():
            self._exporter.shutdown()  # ends the wait between two attempts
            num_lost = self._num_put - self._exporter.num_left
            self._count_dropped(num_lost)
            log.warning("spans are left behind: their destination does not take them", num_spans=num_lost)


class _Accounting(SpanExporter):
    """Counts what has left the queue, and what of that was lost."""

    def __init__(self, exporter: SpanExporter, count_dropped: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._count_dropped = count_dropped
        self.num_left = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:  # the processor logs what is raised, and goes on
            self.num_left += len(spans)
            if result is not SpanExportResult.SUCCESS:
                self._count_dropped(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

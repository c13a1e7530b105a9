"""Times copies between host and device by events in the device's stream, so that no call waits for the timing.

Knows no engine. The events are an argument, so that tests need no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from trt.contract import DeviceCopies


class TimingEvent(Protocol):
    """An event in a stream of the device (`torch.cuda.Event`)."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Wait until the stream has reached this event."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds from this event to the other; the stream must have reached both."""
        ...


class CopyClock:
    """Measures the copies of one call."""

    def __init__(self, make_event: Callable[[], TimingEvent]) -> None:
        self._make_event = make_event
        self._to_device: list[tuple[TimingEvent, TimingEvent]] = []
        self._to_host: list[tuple[TimingEvent, TimingEvent]] = []

    def start(self) -> None:
        """Begin a new call."""
        self._to_device, self._to_host = [], []

    @contextmanager
    def to_device(self) -> Iterator[None]:
        yield from self._timed(self._to_device)

    @contextmanager
    def to_host(self) -> Iterator[None]:
        yield from self._timed(self._to_host)

    def _timed(self, marks: list[tuple[TimingEvent, TimingEvent]]) -> Iterator[None]:
        began, ended = self._make_event(), self._make_event()
        began.record()
        yield
        ended.record()
        marks.append((began, ended))

    def copies(self) -> DeviceCopies:
        """Return the copy times of the last call. Call it only after the call's results have arrived on the host."""
        return DeviceCopies(_seconds(self._to_device), _seconds(self._to_host))


def _seconds(marks: list[tuple[TimingEvent, TimingEvent]]) -> float:
    for _, ended in marks:
        ended.synchronize()
    return sum(began.elapsed_time(ended) for began, ended in marks) / 1000

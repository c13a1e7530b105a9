"""Times copies between host and device by events in the device's own stream, so that nothing waits for the timing.

Knows no engine; the events are given, so that it can be tried without a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from trt.contract import DeviceCopies


class TimingEvent(Protocol):
    """A mark in a stream of the device (`torch.cuda.Event`)."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Wait until the stream has passed this mark."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this mark to the other; both must have been passed."""
        ...


class CopyClock:
    """The copies of one call."""

    def __init__(self, make_event: Callable[[], TimingEvent]) -> None:
        self._make_event = make_event
        self._to_device: list[tuple[TimingEvent, TimingEvent]] = []
        self._to_host: list[tuple[TimingEvent, TimingEvent]] = []

    def start(self) -> None:
        """A new call begins."""
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
        """Of the call that has ended; its last copy is through, and so its mark as good as passed."""
        return DeviceCopies(_seconds(self._to_device), _seconds(self._to_host))


def _seconds(marks: list[tuple[TimingEvent, TimingEvent]]) -> float:
    for _, ended in marks:
        ended.synchronize()
    return sum(began.elapsed_time(ended) for began, ended in marks) / 1000

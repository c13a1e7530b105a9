"""Times of copies between host and device, by events of a stream whose clock the test advances."""

from __future__ import annotations

import pytest

from trt.contract import DeviceCopies
from trt.cuda.copy_clock import CopyClock


class Stream:
    """A device whose clock the test advances."""

    def __init__(self) -> None:
        self.now_ms = 0.0

    def event(self) -> Mark:
        return Mark(self)


class Mark:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.at_ms: float | None = None
        self.is_passed = False

    def record(self) -> None:
        self.at_ms = self.stream.now_ms

    def synchronize(self) -> None:
        self.is_passed = True

    def elapsed_time(self, end_event: Mark, /) -> float:
        assert end_event.is_passed, "a mark that the stream has not passed has no time"
        return end_event.at_ms - self.at_ms


def test_copies_are_summed_by_direction_without_the_work_between_them():
    stream = Stream()
    clock = CopyClock(stream.event)
    clock.start()
    for copy_ms in (1.0, 2.0):
        with clock.to_device():
            stream.now_ms += copy_ms
        stream.now_ms += 100.0
    with clock.to_host():
        stream.now_ms += 4.0

    assert clock.copies() == DeviceCopies(pytest.approx(0.003), pytest.approx(0.004))


def test_the_start_of_a_call_resets_the_times():
    stream = Stream()
    clock = CopyClock(stream.event)
    with clock.to_device():
        stream.now_ms += 1.0
    clock.start()

    assert clock.copies() == DeviceCopies(0.0, 0.0)

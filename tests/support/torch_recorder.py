"""A torch device with streams and graphs, without a GPU: tensors are the processor's, and what depends on the kind of
device is recorded.

As lazy as a GPU may be: work on the fill stream runs only when a caller waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from trt.runtimes.torch_device import TorchDevice


class LazyStream:
    """A fill stream."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self.num_done = 0

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def enqueue(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def record_event(self) -> LazyEvent:
        return LazyEvent(self, self.num_done + len(self.waiting))

    def wait_on_device(self, event: LazyEvent) -> None:
        event.synchronize()


class LazyEvent:
    """A point in a `LazyStream`."""

    def __init__(self, stream: LazyStream, num_before: int) -> None:
        self._stream = stream
        self._num_before = num_before

    def synchronize(self) -> None:
        stream = self._stream
        while stream.num_done < self._num_before:
            stream.waiting.popleft()()
            stream.num_done += 1


class RecordingTorch:
    """Records which calls were made while the device was current."""

    def __init__(self) -> None:
        self.depth = 0  # how often it is current
        self.num_recorded = 0
        self.num_replayed = 0
        self.fault: Exception | None = None  # raised by recording
        self.device = TorchDevice(torch.device("cpu"), self._current, self._make_event, self._record)

    @contextmanager
    def _current(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def _make_event(self) -> Any:
        assert self.depth, "an event belongs to the device that is current when it is made"
        return _TimingEvent(self)

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        assert self.depth
        if self.fault is not None:
            raise self.fault
        work()
        self.num_recorded += 1

        def replay() -> None:
            assert self.depth
            self.num_replayed += 1
            work()

        return replay


class _TimingEvent:
    def __init__(self, torch_: RecordingTorch) -> None:
        self._torch = torch_
        self._is_recorded = False

    def record(self) -> None:
        assert self._torch.depth
        self._is_recorded = True

    def synchronize(self) -> None:
        assert self._is_recorded

    def elapsed_time(self, end_event: _TimingEvent, /) -> float:
        assert self._torch.depth
        assert self._is_recorded
        assert end_event._is_recorded
        return 0.25

"""Handles SIGINT (Ctrl-C) and SIGTERM: at once where nothing is lost, after the current step during training."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal has requested the end of the run."""

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. First signal: stop after this step. Second: stop now."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled((signal.SIGTERM,), interrupt):
        yield


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Let both signals set a flag, for a loop that ends after its current step."""
    request = StopRequest()
    with _handled(_SIGNALS, request.handle):
        yield request


@contextmanager
def _handled(signals: tuple[signal.Signals, ...], handler: Any) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)

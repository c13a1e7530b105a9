"""Ctrl-C and SIGTERM: at once where nothing can be lost, after the step in hand where weights are being changed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked for an end."""

    def __init__(self) -> None:
        self.asked = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The first signal is a request, a second one is meant."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises `KeyboardInterrupt`, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled((signal.SIGTERM,), interrupt):
        yield


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Both signals only leave a request, for whoever can end in good order to look at."""
    request = StopRequest()
    with _handled(_SIGNALS, request.hear):
        yield request


@contextmanager
def _handled(signals: tuple[signal.Signals, ...], handler: Any) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)

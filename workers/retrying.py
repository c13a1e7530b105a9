"""Tries a call again while its error says that the world was not ready.

Used on threads that may wait; the loop itself never waits. Backoff is exponential with full jitter (tenacity).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_never, wait_random_exponential
from tenacity.stop import stop_base

from workers.errors import Transient

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: First and longest pause between two attempts, in seconds.
BASE_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0


class Stopped(Exception):
    """The worker ends; the call was given up and its message is left to the next owner."""


class Retry:
    """Calls a function until it succeeds; ends at once when stopped."""

    def __init__(self, on_retry: Callable[[], None] = lambda: None) -> None:
        self._stopped = threading.Event()
        self._on_retry = on_retry

    def stop(self) -> None:
        """Give up everything that is being tried."""
        self._stopped.set()

    def __call__(self, what: str, call: Callable[[], T], *, stop: stop_base = stop_never) -> T:
        """Return `call()`, tried again on `Transient`; any other error passes. Raises `Stopped` after `stop()`."""
        retrying = Retrying(
            retry=retry_if_exception_type(Transient),
            wait=wait_random_exponential(multiplier=BASE_PAUSE_S, max=MAX_PAUSE_S),
            stop=stop,
            sleep=self._sleep,
            before_sleep=lambda state: self._note(what, state),
            reraise=True,
        )
        return retrying(call)

    def _note(self, what: str, state: RetryCallState) -> None:
        self._on_retry()
        error = state.outcome.exception() if state.outcome is not None else None
        log.warning("trying again", what=what, attempt=state.attempt_number, error=str(error))

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopped

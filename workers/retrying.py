"""Retries a call while it fails with `Transient`: exponential backoff with full jitter, by tenacity.

`Retry` is for threads that may wait. The loop never waits; `pause_s` gives the time of its next attempt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_never, wait_random_exponential
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from workers.errors import Transient

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: First and longest pause between two attempts, in seconds.
BASE_PAUSE_S, MAX_PAUSE_S = 0.05, 2.0
#: First and longest pause of the loop's retries: publishing and commits.
LOOP_BASE_PAUSE_S, LOOP_MAX_PAUSE_S = 0.1, 5.0

_WAIT = wait_random_exponential(multiplier=BASE_PAUSE_S, max=MAX_PAUSE_S)
_LOOP_WAIT = wait_random_exponential(multiplier=LOOP_BASE_PAUSE_S, max=LOOP_MAX_PAUSE_S)


def pause_s(attempt: int) -> float:
    """Return the pause after the given failed attempt, counted from 1."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = attempt
    return _LOOP_WAIT(state)


def is_worth_a_line(attempt: int) -> bool:
    """Whether to log a failed attempt: the first, second, fourth, eighth…, so that an outage does not fill the log."""
    return attempt & (attempt - 1) == 0


class Stopped(Exception):
    """The worker ends: the call was given up, and the next owner repeats its message."""


class Retry:
    """Calls a function until it succeeds; ends at once when stopped."""

    def __init__(
        self,
        on_retry: Callable[[], None] = lambda: None,
        on_error: Callable[[BaseException], None] = lambda error: None,
        on_success: Callable[[], None] = lambda: None,
        wait: wait_base | None = None,
    ) -> None:
        """`on_retry` and `on_error` (with the error) are called before each pause, `on_success` after a success."""
        self._stopped = threading.Event()
        self._on_retry = on_retry
        self._on_error = on_error
        self._on_success = on_success
        self._wait = wait or _WAIT

    def stop(self) -> None:
        """Give up every call in progress."""
        self._stopped.set()

    def __call__(self, what: str, call: Callable[[], T], *, stop: stop_base = stop_never) -> T:
        """Return `call()`, retried on `Transient`; raises any other error at once, and `Stopped` after `stop()`."""
        retrying = Retrying(
            retry=retry_if_exception_type(Transient),
            wait=self._wait,
            stop=stop,
            sleep=self._sleep,
            before_sleep=lambda state: self._note(what, state),
            reraise=True,
        )
        result = retrying(call)
        self._on_success()
        return result

    def _note(self, what: str, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        self._on_retry()
        if error is not None:
            self._on_error(error)
        if is_worth_a_line(state.attempt_number):
            log.warning("trying again", what=what, attempt=state.attempt_number, error=str(error))

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopped

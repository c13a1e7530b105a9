"""Runs callbacks for the results of other threads on the loop's thread.

One idiom for all work on other threads: start a task with a callback, wake the loop when the task has ended, run
the callback in the loop's next turn. Knows nothing of what the tasks do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from typing import TypeVar

R = TypeVar("R")


class Landing:
    """Keeps the callbacks of ended tasks for the loop's thread, in the order in which the tasks ended."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._ended: deque[Callable[[], None]] = deque()
        self.num_pending = 0  # started tasks whose callback has not run

    def start(
        self,
        executor: Executor,
        task: Callable[[], R],
        then: Callable[[R], None],
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Run `task` on the executor; `turn` calls `then` with its result, or `failed` with its exception."""
        self.watch(executor.submit(task), then, failed)

    def watch(
        self, future: Future[R], then: Callable[[R], None], failed: Callable[[Exception], None] | None = None
    ) -> None:
        """Like `start`, for a task that is running already. Without `failed`, `turn` raises the exception."""
        self.num_pending += 1

        def ended(future: Future[R]) -> None:
            # Runs on the task's thread: queue the callback and wake, nothing else.
            self._ended.append(lambda: self._land(future, then, failed))
            self._wake()

        future.add_done_callback(ended)

    def turn(self) -> None:
        """Run the callbacks of all tasks that have ended, on the calling thread. Raises what a task raised."""
        while self._ended:
            self._ended.popleft()()

    def _land(self, future: Future[R], then: Callable[[R], None], failed: Callable[[Exception], None] | None) -> None:
        self.num_pending -= 1
        try:
            result = future.result()
        except CancelledError:
            return  # its executor was shut down: the worker ends
        except Exception as error:
            if failed is None:
                raise
            failed(error)
            return
        then(result)

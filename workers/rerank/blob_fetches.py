"""Fetches token blobs on a few threads of its own, and waits out a store that is away.

The loop never waits for the store: it starts a fetch and is woken by its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from prometheus_client import Histogram

from workers.ports import Interval, TokenStore
from workers.rerank.state import Read
from workers.retrying import Retry


class BlobFetches:
    """Fetches in flight; each is tried until the store answers or the worker ends."""

    def __init__(
        self, store: TokenStore, retry: Retry, num_threads: int, seconds: Histogram, clock: Callable[[], float]
    ) -> None:
        """`seconds` is told of each read that the store answered; `clock` is the loop's."""
        self._store = store
        self._clock = clock
        self._retry = retry
        self._seconds = seconds
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")

    def start(self, keys: Sequence[str]) -> Future[Read]:
        return self._executor.submit(self._read, keys)

    def _read(self, keys: Sequence[str]) -> Read:
        began_at, num_attempts = self._clock(), 0

        def attempt() -> Read:
            nonlocal num_attempts
            num_attempts += 1
            attempted_at = self._clock()
            blobs = self._store.get_many(keys)
            ended_at = self._clock()
            self._seconds.observe(ended_at - attempted_at)
            return Read(blobs, Interval(began_at, ended_at), num_attempts)

        return self._retry("token blobs", attempt)

    def close(self) -> None:
        self._retry.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)

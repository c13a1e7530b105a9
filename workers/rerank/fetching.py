"""Fetches token blobs on threads, and waits while the store is away.

The loop never waits for the store: it starts a fetch and receives a future.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import Histogram

from workers.ports import Interval, TokenStore
from workers.retrying import Retry


@dataclass(frozen=True, slots=True)
class Read:
    """The store's answer to one fetch: one blob or None per key."""

    blobs: Sequence[bytes | None]
    interval: Interval  # from the first attempt's start to the last one's end
    num_attempts: int


class BlobFetcher:
    """Fetches blobs; each fetch is retried until the store answers or the worker ends."""

    def __init__(
        self, store: TokenStore, retry: Retry, num_threads: int, seconds: Histogram, clock: Callable[[], float]
    ) -> None:
        """`seconds` observes the time of each successful read; `clock` is the loop's."""
        self._store = store
        self._clock = clock
        self._retry = retry
        self._seconds = seconds
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")

    def start(self, keys: Sequence[str]) -> Future[Read]:
        """Start to fetch the blobs of these keys."""
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
        """Give up all fetches and end the threads."""
        self._retry.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)

"""Fetches token blobs on a few threads of its own, and waits out a store that is away.

The loop never waits for the store: it starts a fetch and is woken by its end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from prometheus_client import Histogram

from workers.ports import TokenStore
from workers.retrying import Retry


class BlobFetches:
    """Fetches in flight; each is tried until the store answers or the worker ends."""

    def __init__(self, store: TokenStore, retry: Retry, num_threads: int, seconds: Histogram) -> None:
        """`seconds` is told of each read that the store answered."""
        self._store = store
        self._retry = retry
        self._seconds = seconds
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")

    def start(self, keys: Sequence[str]) -> Future[list[bytes | None]]:
        return self._executor.submit(self._retry, "token blobs", lambda: self._read(keys))

    def _read(self, keys: Sequence[str]) -> list[bytes | None]:
        started = time.perf_counter()
        blobs = self._store.get_many(keys)
        self._seconds.observe(time.perf_counter() - started)
        return blobs

    def close(self) -> None:
        self._retry.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)

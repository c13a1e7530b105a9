"""Fetches images for the ingest job: decides when each fetch starts, limits the bytes in work, and retries.

Runs on the loop's thread; the fetches run on others (`IngestStages.fetch`). `FetchQueue` decides the order and the
pauses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import structlog

from workers.errors import Poison, Transient
from workers.ingest.addresses import ImageAddress
from workers.ingest.scheduling import FetchQueue
from workers.ingest.work import ImageWork, IngestLimits
from workers.metrics import Metrics
from workers.ports import Interval

log = structlog.get_logger(__name__)


class StartFetch(Protocol):
    """Reads the bytes at an address in one attempt (`IngestStages.fetch`)."""

    def __call__(
        self, address: ImageAddress, then: Callable[[bytes], None], failed: Callable[[Exception], None]
    ) -> None: ...


class Fetching:
    """The images that wait for their fetch or are being fetched."""

    def __init__(
        self,
        start_fetch: StartFetch,
        queue: FetchQueue[ImageWork],
        limits: IngestLimits,
        metrics: Metrics,
        *,
        then: Callable[[ImageWork, bytes], None],
        failed: Callable[[ImageWork, Exception], None],
        dropped: Callable[[ImageWork], None],
    ) -> None:
        """`failed` is called with an image and its last error, `dropped` with an image that was dropped meanwhile."""
        self._start_fetch = start_fetch
        self._queue = queue
        self._limits = limits
        self._metrics = metrics
        self._then = then
        self._failed = failed
        self._dropped = dropped
        self._now = 0.0

    def add(self, image: ImageWork, address: ImageAddress) -> None:
        image.address = address
        self._queue.add(image, address.host)

    def start(self, now: float, num_bytes: int) -> None:
        """Start the fetches that are due; `num_bytes` is the number of bytes in work."""
        self._now = now
        while self._fits(num_bytes) and (image := self._queue.take(now)) is not None:
            if image.address is None or image.is_dropped:
                self._queue.abandon(image)
                self._dropped(image)
                continue
            # The fetch stage begins with the first attempt and includes the pauses.
            image.stages.setdefault("fetch", Interval(now, now))
            image.num_attempts = self._queue.num_attempts(image)
            self._start_fetch(image.address, partial(self._fetched, image), partial(self._not_fetched, image))

    def turn(self, now: float) -> None:
        """Set the time of the results that land next."""
        self._now = now

    def remove_dropped(self) -> None:
        """Remove the dropped images that wait."""
        for image in self._queue.remove(lambda image: image.is_dropped):
            self._dropped(image)

    def num_waiting(self) -> int:
        return self._queue.num_waiting()

    def num_fetching(self) -> int:
        return self._queue.num_fetching

    def wants_turn_in_s(self, now: float, num_bytes: int) -> float | None:
        if not self._fits(num_bytes):
            return None  # only a result that lands makes room, and it wakes the loop
        return 0.0 if self._queue.can_take() else self._queue.wants_turn_in_s(now)

    def _fits(self, num_bytes: int) -> bool:
        """Whether another image of the largest size fits into the bytes in work; always if no fetch is under way."""
        reserved = (self._queue.num_fetching + 1) * self._limits.max_image_bytes
        return self._queue.num_fetching == 0 or num_bytes + reserved <= self._limits.max_inflight_bytes

    def _fetched(self, image: ImageWork, data: bytes) -> None:
        self._queue.succeeded(image, self._now)
        image.stages["fetch"] = Interval(image.stages["fetch"].started_at, self._now)
        self._then(image, data)

    def _not_fetched(self, image: ImageWork, error: Exception) -> None:
        if image.is_dropped:
            self._queue.abandon(image)
            self._dropped(image)
        elif not isinstance(error, Transient):
            self._queue.abandon(image)
            self._failed(image, error)
        elif self._queue.failed(image, error, self._now):
            self._metrics.count_retry("image_fetch")
            self._log(image, error)
        else:
            unavailable = Poison("image_unavailable", str(error))
            unavailable.__cause__ = error
            self._failed(image, unavailable)

    def _log(self, image: ImageWork, error: Transient) -> None:
        num_failures = self._queue.num_failures(image)
        if num_failures & (num_failures - 1) == 0:  # 1, 2, 4, 8…: a host that is down does not fill the log
            host = image.address.host if image.address is not None else ""
            log.warning("image not fetched, trying again", host=host, failures=num_failures, error=str(error))

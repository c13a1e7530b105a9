"""Limits of the gateway: pairs in flight, and requests per second of each caller.

Pure; time is an argument.
"""

from __future__ import annotations

import math

from workers.gateway.errors import ApiError

#: Bounds of the Retry-After header, in seconds.
MIN_RETRY_S, MAX_RETRY_S = 1, 30
#: The rate of finished pairs is averaged over about this time.
RATE_WINDOW_S = 5.0


class PairBudget:
    """Counts the pairs in flight and refuses a request that would exceed the limit."""

    def __init__(self, max_pairs: int) -> None:
        self.max_pairs = max_pairs
        self.num_pairs = 0
        self._pairs_per_s = 0.0
        self._last_at: float | None = None

    def take(self, num_pairs: int) -> None:
        """Count a request's pairs. Raises `ApiError` with Retry-After; the only open request is always accepted."""
        if self.num_pairs and self.num_pairs + num_pairs > self.max_pairs:
            retry_s = self._seconds_until_free(self.num_pairs + num_pairs - self.max_pairs)
            raise ApiError(
                429,
                "overloaded",
                f"{self.num_pairs} pairs are in flight and {num_pairs} more would exceed {self.max_pairs}; "
                f"try again in {retry_s} s",
                {"Retry-After": str(retry_s)},
            )
        self.num_pairs += num_pairs

    def give_back(self, num_pairs: int, now: float) -> None:
        """Remove a finished request's pairs from the count."""
        self.num_pairs -= num_pairs
        if self._last_at is not None:
            elapsed = max(now - self._last_at, 1e-3)
            weight = 1 - math.exp(-elapsed / RATE_WINDOW_S)
            self._pairs_per_s += weight * (num_pairs / elapsed - self._pairs_per_s)
        self._last_at = now

    def _seconds_until_free(self, num_pairs: int) -> int:
        if self._pairs_per_s <= 0:
            return MIN_RETRY_S
        return min(max(math.ceil(num_pairs / self._pairs_per_s), MIN_RETRY_S), MAX_RETRY_S)


class RateLimit:
    """A token bucket for each caller. Callers are the names of API keys, so their number is bounded."""

    def __init__(self, requests_per_s: float | None, *, burst_s: float = 2.0) -> None:
        """`requests_per_s=None` means no limit. An idle caller may send the requests of `burst_s` seconds at once."""
        self._rate = requests_per_s
        self._burst = 0.0 if requests_per_s is None else max(1.0, requests_per_s * burst_s)
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: str, now: float) -> None:
        """Count one request. Raises `ApiError` with Retry-After."""
        if self._rate is None:
            return
        tokens, at = self._buckets.get(caller, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        if tokens < 1:
            self._buckets[caller] = tokens, now
            retry_s = max(MIN_RETRY_S, math.ceil((1 - tokens) / self._rate))
            raise ApiError(
                429,
                "rate_limited",
                f"more than {self._rate:g} requests per second; try again in {retry_s} s",
                {"Retry-After": str(retry_s)},
            )
        self._buckets[caller] = tokens - 1, now

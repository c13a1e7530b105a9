"""Keeps the requests that wait for their replies, by request id.

Matches a reply to its callers and distinguishes late replies from unknown ones. Two callers that send the same
request under the same id share one reply. Pure: waiters are opaque, time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from workers.gateway.errors import ApiError

W = TypeVar("W")

#: A reply may arrive up to this long after its callers have left; deadlines are far shorter.
REMEMBERED_S = 600.0
#: Most closed requests to remember: ten minutes at 160 requests per second.
MAX_REMEMBERED = 100_000

#: `late`: the reply came after its callers had left; `unknown`: it answers no request of this process.
Unexpected = Literal["late", "unknown"]


@dataclass(slots=True)
class _Open(Generic[W]):
    waiter: W
    fingerprint: bytes
    num_callers: int = 1


class PendingReplies(Generic[W]):
    """Open requests with their waiters, and recently closed requests."""

    def __init__(self, *, max_remembered: int = MAX_REMEMBERED, remembered_s: float = REMEMBERED_S) -> None:
        self._max_remembered = max_remembered
        self._remembered_s = remembered_s
        self._open: dict[str, _Open[W]] = {}
        self._closed: dict[str, tuple[bytes, float]] = {}  # in the order of closing: fingerprint and time

    def __len__(self) -> int:
        return len(self._open)

    def join(self, request_id: str, fingerprint: bytes, make: Callable[[], W], now: float) -> tuple[W, bool]:
        """Return the waiter of a request, and whether the request is new and has to be sent.

        `fingerprint` identifies the request's content. Raises `ApiError` if the id was used with other content, because
        a reply to the earlier request could still arrive.
        """
        self._forget_old(now)
        present = self._open.get(request_id)
        used_for = present.fingerprint if present is not None else self._closed.get(request_id, (fingerprint,))[0]
        if used_for != fingerprint:
            raise ApiError(
                422,
                "idempotency_key_reused",
                "this Idempotency-Key was sent with another request; use a new key for each request",
            )
        if present is not None:
            present.num_callers += 1
            return present.waiter, False
        self._open[request_id] = _Open(make(), fingerprint)
        return self._open[request_id].waiter, True

    def close(self, request_id: str, now: float) -> W | Unexpected:
        """Remove and return the waiter of a request whose reply has arrived, or whose sending failed."""
        entry = self._open.pop(request_id, None)
        if entry is None:
            return "late" if request_id in self._closed else "unknown"
        self._remember(request_id, entry.fingerprint, now)
        return entry.waiter

    def leave(self, request_id: str, now: float) -> bool:
        """Note that one caller has stopped waiting; returns whether it was the last caller of an open request."""
        entry = self._open.get(request_id)
        if entry is None:
            return False
        entry.num_callers -= 1
        if entry.num_callers:
            return False
        del self._open[request_id]
        self._remember(request_id, entry.fingerprint, now)
        return True

    def _remember(self, request_id: str, fingerprint: bytes, now: float) -> None:
        self._closed.pop(request_id, None)
        self._closed[request_id] = fingerprint, now
        self._forget_old(now)

    def _forget_old(self, now: float) -> None:
        while self._closed:
            oldest = next(iter(self._closed))
            if len(self._closed) <= self._max_remembered and now - self._closed[oldest][1] <= self._remembered_s:
                return
            del self._closed[oldest]

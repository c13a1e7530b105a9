"""Decides when images are fetched and when they are encoded.

Pure: time is an argument; knows nothing of addresses, bytes, pixels and Kafka.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from workers.errors import Transient

T = TypeVar("T")

#: The first and the longest pause before an image is fetched again; each pause is up to twice the previous one.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
#: The longest pause that a host may request (`Retry-After`).
LONGEST_RETRY_AFTER_S = 120.0
#: A fetch that takes longer than this does not increase its host's number of fetches.
SLOW_FETCH_S = 2.0
#: Idle hosts are forgotten when there are this many hosts.
_MIN_REMEMBERED_HOSTS = 1_000


class Unavailable(Transient):
    """The image cannot be fetched now.

    `retry_after_s` is the pause that the host requests. `give_up_after_s` shortens the time for which the image is
    retried, for errors that rarely pass.
    """

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, give_up_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.give_up_after_s = give_up_after_s


@dataclass(slots=True, eq=False)
class _Fetch(Generic[T]):
    item: T
    host: _Host[T]
    num_attempts: int = 0
    first_attempt_at: float = 0.0
    attempt_at: float = 0.0


@dataclass(slots=True, eq=False)
class _Host(Generic[T]):
    """The fetches of one host.

    `window` is the number of fetches it may have at once. It grows with each image that arrives soon and is halved by
    each failure, so a slow or failed host has few of the fetches and a fast host has many.
    """

    window: int
    ready: deque[_Fetch[T]] = field(default_factory=deque)
    num_fetching: int = 0
    num_paused: int = 0
    not_before: float = 0.0
    num_failures: int = 0  # failures since the last success
    is_runnable: bool = False

    @property
    def is_idle(self) -> bool:
        return not (self.ready or self.num_fetching or self.num_paused)


class FetchQueue(Generic[T]):
    """Items that wait for a fetch, by host; hosts take turns.

    An item whose fetch failed is tried again after a pause, until `retry_for_s` has passed since its first attempt.
    """

    def __init__(
        self, *, max_fetches: int, retry_for_s: float, uniform: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._max_fetches = max_fetches
        self._retry_for_s = retry_for_s
        self._uniform = uniform
        self._first_window = max(1, max_fetches // 4)
        self._largest_window = max(1, max_fetches * 3 // 4)
        self._hosts: dict[str, _Host[T]] = {}
        self._runnable: deque[_Host[T]] = deque()
        self._fetch_of: dict[T, _Fetch[T]] = {}
        self._due: list[tuple[float, int, _Host[T], _Fetch[T] | None]] = []  # ends of pauses, the earliest first
        self._numbers = itertools.count()
        self._forget_hosts_at = _MIN_REMEMBERED_HOSTS
        self.num_fetching = 0

    def add(self, item: T, host_name: str) -> None:
        """Add an item. It must be hashable and not yet in the queue."""
        host = self._hosts.get(host_name)
        if host is None:
            self._forget_idle_hosts()
            host = self._hosts[host_name] = _Host(self._first_window)
        fetch = self._fetch_of[item] = _Fetch(item, host)
        host.ready.append(fetch)
        self._offer(host)

    def take(self, now: float) -> T | None:
        """Return the next item to fetch, else None. The caller must then call `succeeded`, `failed` or `abandon`."""
        self._end_pauses(now)
        while self._runnable and self.num_fetching < self._max_fetches:
            host = self._runnable.popleft()
            host.is_runnable = False
            if not self._may_fetch(host, now):
                continue
            fetch = host.ready.popleft()
            fetch.attempt_at = now
            if fetch.num_attempts == 0:
                fetch.first_attempt_at = now
            fetch.num_attempts += 1
            host.num_fetching += 1
            self.num_fetching += 1
            self._offer(host)
            return fetch.item
        return None

    def succeeded(self, item: T, now: float) -> None:
        """Note that the bytes of an item have arrived."""
        fetch = self._ended(item)
        host = fetch.host
        host.num_failures = 0
        if now - fetch.attempt_at <= SLOW_FETCH_S:
            host.window = min(host.window + 1, self._largest_window)
        del self._fetch_of[item]
        self._offer(host)

    def failed(self, item: T, error: Transient, now: float) -> bool:
        """Note that a fetch failed; returns whether the item will be retried. Otherwise the item leaves the queue."""
        fetch = self._ended(item)
        host = fetch.host
        host.num_failures += 1
        host.window = max(1, host.window // 2)
        asked_s, give_up_after_s = 0.0, self._retry_for_s
        if isinstance(error, Unavailable):
            asked_s = min(error.retry_after_s or 0.0, LONGEST_RETRY_AFTER_S)
            give_up_after_s = min(give_up_after_s, error.give_up_after_s or give_up_after_s)
        if asked_s:
            host.not_before = max(host.not_before, now + asked_s)
            heapq.heappush(self._due, (host.not_before, next(self._numbers), host, None))
        left_s = fetch.first_attempt_at + give_up_after_s - now
        if left_s <= 0:
            del self._fetch_of[item]
            self._offer(host)
            return False
        longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(fetch.num_attempts - 1, 16))
        # The last attempt is made when the retry time ends, even if the pause would be longer.
        pause_s = min(max(self._uniform(longest_s / 2, longest_s), asked_s), left_s)
        host.num_paused += 1
        heapq.heappush(self._due, (now + pause_s, next(self._numbers), host, fetch))
        self._offer(host)
        return True

    def abandon(self, item: T) -> None:
        """Remove a taken item that will not be fetched."""
        fetch = self._ended(item)
        del self._fetch_of[item]
        self._offer(fetch.host)

    def remove(self, is_removed: Callable[[T], bool]) -> list[T]:
        """Remove and return the waiting items for which `is_removed` is true; fetches under way go on."""
        removed = [fetch.item for host in self._hosts.values() for fetch in host.ready if is_removed(fetch.item)]
        removed += [fetch.item for _, _, _, fetch in self._due if fetch is not None and is_removed(fetch.item)]
        gone = {id(self._fetch_of.pop(item)) for item in removed}
        for host in self._hosts.values():
            host.ready = deque(fetch for fetch in host.ready if id(fetch) not in gone)
        for _, _, host, fetch in self._due:
            host.num_paused -= fetch is not None and id(fetch) in gone
        self._due = [due for due in self._due if due[3] is None or id(due[3]) not in gone]
        heapq.heapify(self._due)
        return removed

    def num_waiting(self) -> int:
        """Return the number of items that wait for a fetch."""
        return len(self._fetch_of) - self.num_fetching

    def num_attempts(self, item: T) -> int:
        """Return the number of attempts on an item in the queue."""
        return self._fetch_of[item].num_attempts

    def num_failures(self, item: T) -> int:
        """Return the failures of the item's host since the host's last success."""
        return self._fetch_of[item].host.num_failures

    def can_take(self) -> bool:
        """Whether an item may be ready; pauses that have just ended count only after the next `take`."""
        return bool(self._runnable) and self.num_fetching < self._max_fetches

    def wants_turn_in_s(self, now: float) -> float | None:
        """Return the seconds until the next pause ends, None without a pause."""
        return max(0.0, self._due[0][0] - now) if self._due else None

    def _ended(self, item: T) -> _Fetch[T]:
        fetch = self._fetch_of[item]
        fetch.host.num_fetching -= 1
        self.num_fetching -= 1
        return fetch

    def _end_pauses(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, host, fetch = heapq.heappop(self._due)
            if fetch is not None:
                host.num_paused -= 1
                host.ready.append(fetch)
            self._offer(host)

    def _offer(self, host: _Host[T]) -> None:
        """Queue a host for its turn if it has an item to fetch and room in its window."""
        if host.ready and host.num_fetching < host.window and not host.is_runnable:
            host.is_runnable = True
            self._runnable.append(host)

    def _may_fetch(self, host: _Host[T], now: float) -> bool:
        return bool(host.ready) and host.num_fetching < host.window and now >= host.not_before

    def _forget_idle_hosts(self) -> None:
        if len(self._hosts) >= self._forget_hosts_at:
            self._hosts = {name: host for name, host in self._hosts.items() if not host.is_idle}
            self._forget_hosts_at = max(_MIN_REMEMBERED_HOSTS, 2 * len(self._hosts))


class ImageBatcher(Generic[T]):
    """Groups decoded images into batches for the engine, in the order in which they became ready."""

    def __init__(self, *, max_images: int, max_wait_s: float) -> None:
        self._max_images = max_images
        self._max_wait_s = max_wait_s
        self._waiting: deque[tuple[float, T]] = deque()

    def add(self, image: T, now: float) -> None:
        self._waiting.append((now, image))

    def take(self, now: float, *, more_is_coming: bool) -> list[T]:
        """Return the next batch, or an empty list while it is better to wait.

        A batch is returned when it is full, when its oldest image has waited long enough, or at once if no other image
        is being prepared.
        """
        if more_is_coming and len(self._waiting) < self._max_images and self.wants_turn_in_s(now) != 0.0:
            return []
        return [self._waiting.popleft()[1] for _ in range(min(len(self._waiting), self._max_images))]

    def wants_turn_in_s(self, now: float) -> float | None:
        """Return the seconds until the oldest image has waited long enough, None without images."""
        if not self._waiting:
            return None
        return max(0.0, self._waiting[0][0] + self._max_wait_s - now)

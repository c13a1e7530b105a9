"""Commits offsets at an interval, behind the deliveries that have settled them.

Knows the inbox by its port only; time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from workers.errors import Transient
from workers.ports import Inbox, Partition

#: First pause before something that failed is tried again.
RETRY_BASE_S = 0.1


class Counts(Protocol):
    """Whom a delivery tells what it does."""

    def count_commit(self) -> None: ...

    def count_retry(self, kind: Literal["publish", "commit"]) -> None: ...


@dataclass(slots=True)
class Committer:
    """Commits offsets at an interval, one commit at a time; what failed is committed again with the next."""

    inbox: Inbox
    interval_s: float
    wake: Callable[[], None]
    counts: Counts
    _waiting: dict[Partition, int] = field(default_factory=dict)
    _flying: dict[Partition, int] = field(default_factory=dict)
    _commit: Future[None] | None = None
    _due: float = 0.0

    def add(self, offsets: dict[Partition, int]) -> None:
        self._waiting.update(offsets)

    def turn(self, now: float) -> None:
        if self._commit is not None and self._commit.done():
            commit, self._commit = self._commit, None
            try:
                commit.result()
                self.counts.count_commit()
            except Transient:
                self.counts.count_retry("commit")
                self._waiting = {**self._flying, **self._waiting}
                self._due = now + max(self.interval_s, RETRY_BASE_S)
            self._flying = {}
        if self._waiting and self._commit is None and now >= self._due:
            self._flying, self._waiting = self._waiting, {}
            self._due = now + self.interval_s
            self._commit = self.inbox.commit(self._flying)
            self._commit.add_done_callback(lambda _: self.wake())

    def hurry(self) -> None:
        self._due = 0.0

    def wants_turn_in_s(self, now: float) -> float | None:
        return max(0.0, self._due - now) if self._waiting and self._commit is None else None

    def settled(self, partitions: Collection[Partition] | None) -> bool:
        outstanding = {*self._waiting, *self._flying}
        return not (outstanding if partitions is None else outstanding & set(partitions))

    def drop(self, partitions: Collection[Partition]) -> None:
        for partition in partitions:
            self._waiting.pop(partition, None)
            self._flying.pop(partition, None)

"""Reads new records of a topic on a thread, without a group, and reports gaps; implements `workers.ports.Follower`.

The start is fixed when the follower is made: every record published later is read. Knows nothing of what the
records mean.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

import structlog

from workers.bus.reader import KafkaReader
from workers.errors import Transient
from workers.ports import Gap, Record

log = structlog.get_logger(__name__)

#: Records that may wait before the follower stops polling; it is in no group that would expel it.
MAX_WAITING_RECORDS = 1024
MAX_WAITING_BYTES = 16 << 20
POLL_S = 0.5
#: Pause after a failed poll.
RETRY_S = 0.5


class KafkaFollower:
    """Reads the new records of all partitions of one topic, or of some."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        topic: str,
        *,
        wake: Callable[[], None],
        partitions: Collection[int] | None = None,
        read_committed: bool = True,
        max_message_bytes: int = 1 << 20,
    ) -> None:
        """`connection` holds the settings that every client of this broker needs. Raises `Transient`.

        `wake` is called on the follower's thread after records have arrived.
        """
        self._wake = wake
        self._changed = threading.Condition()
        self._waiting: deque[Record | Gap] = deque()
        self._waiting_bytes = 0
        self._error: BaseException | None = None
        self._closing = False
        self._reader = KafkaReader(
            connection,
            [topic],
            partitions=partitions,
            read_committed=read_committed,
            max_message_bytes=max_message_bytes,
        )
        self._thread = threading.Thread(target=self._run, name="kafka-follower", daemon=True)
        self._thread.start()

    def take(self) -> Record | Gap | None:
        if self._error is not None:
            raise self._error
        with self._changed:
            if not self._waiting:
                return None
            taken = self._waiting.popleft()
            self._waiting_bytes -= _num_bytes(taken)
            self._changed.notify()
            return taken

    def unknown_topics(self) -> list[str]:
        """Return the topic in a list if it, or every chosen partition, is missing; else an empty list."""
        return self._reader.unknown_topics()

    def close(self, timeout_s: float) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                self._poll()
        except BaseException as error:
            self._error = error
            self._wake()
        finally:
            self._reader.close()

    def _wait_for_room(self) -> bool:
        """Wait until there is room for another poll; returns False when the follower is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not self._is_full())
            return not self._closing

    def _is_full(self) -> bool:
        return len(self._waiting) >= MAX_WAITING_RECORDS or self._waiting_bytes >= MAX_WAITING_BYTES

    def _poll(self) -> None:
        try:
            records = self._reader.poll(POLL_S)
        except Transient as error:
            log.warning("following a topic failed, trying again", error=str(error))
            with self._changed:
                self._changed.wait_for(lambda: self._closing, RETRY_S)
            return
        arrived: list[Record | Gap] = [*self._reader.gaps(), *records]
        if not arrived:
            return
        with self._changed:
            self._waiting += arrived
            self._waiting_bytes += sum(map(_num_bytes, arrived))
        self._wake()


def _num_bytes(taken: Record | Gap) -> int:
    return taken.num_bytes() if isinstance(taken, Record) else 0

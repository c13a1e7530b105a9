"""The loop of a worker: takes records, turns the job, delivers what is finished, gives partitions back, drains.

One thread. It waits for nothing but its wake signal; whatever else waits (the bus, fetches, the engine) does so on a
thread of its own and wakes it. Knows neither Kafka nor what the job computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from workers.delivery import Delivery
from workers.errors import Poison, as_internal_error
from workers.ports import Finished, Inbox, Job, Record, Revocation

log = structlog.get_logger(__name__)

#: The loop turns at least this often, so that liveness is judged by turning and not by traffic.
MAX_WAIT_S = 0.25
#: Records accepted in one turn: bounds how long a burst keeps finished work from being published.
MAX_RECORDS_PER_TURN = 64


class Wake:
    """A signal that any thread may set and the loop waits for."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> None:
        self._event.set()

    def wait(self, timeout_s: float) -> None:
        self._event.wait(timeout_s)
        self._event.clear()


@dataclass(slots=True)
class _Leaving:
    revocation: Revocation
    deadline: float


class Loop:
    """Drives one job until it is told to stop and has drained."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        job: Job,
        delivery: Delivery,
        dead_letter: Callable[[Record, Poison], Finished],
        wake: Wake,
        clock: Callable[[], float],
        drain_grace_s: float,
        revoke_grace_s: float,
        on_turn: Callable[[float], None] = lambda now: None,
    ) -> None:
        self._inbox = inbox
        self._job = job
        self._delivery = delivery
        self._dead_letter = dead_letter
        self._wake = wake
        self._clock = clock
        self._drain_grace_s = drain_grace_s
        self._revoke_grace_s = revoke_grace_s
        self._on_turn = on_turn
        self._leaving: list[_Leaving] = []
        self._stopping = False
        self._stop_by: float | None = None

    def stop(self) -> None:
        """Take no more records, finish what is in work within the grace period, then return from `run`.

        Safe to call from a signal handler and from any thread.
        """
        self._stopping = True
        self._wake()

    def run(self) -> None:
        """Turn until stopped and drained. Whatever a turn raises ends the loop: the process is to be restarted."""
        while self.turn():
            self._wake.wait(self._wait_s(self._clock()))

    def turn(self) -> bool:
        """Do everything that can be done without waiting; False when the loop is over."""
        now = self._clock()
        self._on_turn(now)
        self._note_revocations(now)
        self._deliver(now)  # first, because it makes room
        if not self._stopping and self._accept(now):
            self._deliver(self._clock())  # read again, because accepting takes time that is a request's
        if self._stopping:
            self._delivery.hurry()
        self._delivery.turn(now)
        self._give_back(now)
        return not self._is_over(now)

    def _accept(self, now: float) -> int:
        """Take records while there is room; returns how many."""
        for number in range(MAX_RECORDS_PER_TURN):
            record = self._inbox.take() if self._job.has_room() else None
            if record is None:
                return number
            self._delivery.begin(record)
            self._accept_record(record, now)
        self._wake()  # there may be more
        return MAX_RECORDS_PER_TURN

    def _accept_record(self, record: Record, now: float) -> None:
        """Start work on a record; whatever is raised becomes its outcome and the work goes on."""
        try:
            self._job.accept(record, now)
        except Exception as error:
            self._refuse(record, as_internal_error(error, **_ids(record)), now)

    def _refuse(self, record: Record, error: Poison, now: float) -> None:
        try:
            self._job.refuse(record, error, now)
        except Exception as second:
            # The job cannot even write the record's outcome: the dead letter without any reply.
            self._delivery.finish(self._dead_letter(record, as_internal_error(second, **_ids(record))), now)

    def _deliver(self, now: float) -> None:
        for finished in self._job.turn(now):
            self._delivery.finish(finished, now)

    def _note_revocations(self, now: float) -> None:
        for revocation in self._inbox.revocations():
            grace_s = 0.0 if revocation.lost else self._revoke_grace_s
            self._leaving.append(_Leaving(revocation, now + grace_s))

    def _give_back(self, now: float) -> None:
        """Release the partitions whose messages are all delivered, or whose time is up."""
        staying = []
        for leaving in self._leaving:
            partitions = leaving.revocation.partitions
            if not leaving.revocation.lost and not self._delivery.settled(partitions) and now < leaving.deadline:
                self._delivery.hurry()
                staying.append(leaving)
                continue
            self._job.drop(partitions)
            self._delivery.drop(partitions)
            leaving.revocation.release()
        self._leaving = staying

    def _is_over(self, now: float) -> bool:
        if not self._stopping:
            return False
        if self._stop_by is None:
            self._stop_by = now + self._drain_grace_s
            self._inbox.hold()
            log.info("draining", active=self._job.num_active(), grace_s=self._drain_grace_s)
        if self._job.num_active() == 0 and self._delivery.settled():
            log.info("drained")
            return True
        if now >= self._stop_by:
            log.warning("drain grace is over; the next owner repeats what is left", active=self._job.num_active())
            return True
        return False

    def _wait_s(self, now: float) -> float:
        waits = (self._job.wants_turn_in_s(now), self._delivery.wants_turn_in_s(now), MAX_WAIT_S)
        return min(wait for wait in waits if wait is not None)


def _ids(record: Record) -> dict[str, object]:
    return {"topic": record.partition.topic, "partition": record.partition.number, "offset": record.offset}

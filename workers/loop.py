"""The loop of a worker: takes records, turns the job, delivers finished records, gives partitions back, drains.

One thread. It waits only for its wake signal; everything else that waits (the bus, fetches, the engine) runs on
other threads and wakes the loop. Knows neither Kafka nor what the job computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from workers.delivery import Delivery
from workers.errors import Poison, Transient, as_internal_error
from workers.partitions import Partitions
from workers.ports import Finished, Inbox, Job, Partition, Record, Revocation

log = structlog.get_logger(__name__)

#: The loop turns at least this often: liveness is judged by turns and not by traffic, and a stop is noticed.
MAX_WAIT_S = 0.25
#: Most records accepted in one turn, so that a burst does not delay the publishing of finished work.
MAX_RECORDS_PER_TURN = 64
#: Time after which a turn accepts no further record: refusing a malformed record of a megabyte can take 0.1 s.
MAX_ACCEPT_S = 0.05
#: Longest wait, after the grace period, for the commit that marks an orderly end.
LEAVE_S = 1.0


class Wake:
    """A signal that any thread may set and the loop waits for. Not for signal handlers: setting it takes a lock."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> None:
        self._event.set()

    def wait(self, timeout_s: float) -> None:
        self._event.wait(timeout_s)
        self._event.clear()


@dataclass(slots=True)
class _Leaving:
    """Revoked partitions that have not been released."""

    revocation: Revocation
    deadline: float
    left: Future[None] | None = None  # the commit that marks an orderly end


@dataclass(slots=True)
class _Alone:
    """A record taken alone, which waits for the commit of its marker."""

    record: Record
    num_deaths: int
    marked: Future[None]


class Loop:
    """Drives one job until it is stopped and has drained."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        job: Job,
        delivery: Delivery,
        partitions: Partitions,
        dead_letter: Callable[[Record, Poison], Finished],
        wake: Wake,
        clock: Callable[[], float],
        drain_grace_s: float,
        revoke_grace_s: float,
        on_turn: Callable[[float], None] = lambda now: None,
    ) -> None:
        """`dead_letter` makes the outcome of a record for which the job cannot make an outcome."""
        self._inbox = inbox
        self._job = job
        self._delivery = delivery
        self._partitions = partitions
        self._dead_letter = dead_letter
        self._wake = wake
        self._clock = clock
        self._drain_grace_s = drain_grace_s
        self._revoke_grace_s = revoke_grace_s
        self._on_turn = on_turn
        self._leaving: list[_Leaving] = []
        self._alone: _Alone | None = None
        self._awaits_settled = False  # the next record is taken alone, when nothing is in work
        self._must_stop = False
        self._stopping = False
        self._stop_by = 0.0
        self._left: Future[None] | None = None

    def stop(self) -> None:
        """Take no more records, finish the records in work within the grace period, then return from `run`.

        Sets a flag, so that a signal handler may call it; the loop notices within `MAX_WAIT_S`.
        """
        self._must_stop = True

    def run(self) -> None:
        """Turn until stopped and drained. An exception of a turn ends the loop and the process."""
        while self.turn():
            self._wake.wait(self._wait_s(self._clock()))

    def turn(self) -> bool:
        """Do everything that needs no waiting; returns False when the loop has ended."""
        now = self._clock()
        self._on_turn(now)
        self._note_revocations(now)
        self._begin_stop(now)
        self._partitions.turn(now)
        self._deliver(now)  # before accepting, because it makes room
        if not self._stopping and self._accept(now):
            self._deliver(self._clock())  # with a new time, because accepting takes time
        if self._stopping:
            self._delivery.hurry()
        self._delivery.turn(now)
        if self._awaits_settled and self._delivery.settled():
            self._awaits_settled = False
            self._wake()
        self._give_back(now)
        return not self._has_ended(now)

    def _accept(self, now: float) -> int:
        """Accept records while there is room; returns their number."""
        if self._alone is not None or self._partitions.are_suspect():
            return self._accept_alone(now)
        began_at = self._clock()
        for number in range(MAX_RECORDS_PER_TURN):
            if self._clock() - began_at >= MAX_ACCEPT_S:
                self._wake()  # there may be more
                return number
            record = self._inbox.take() if self._job.has_room() and self._delivery.has_room() else None
            if record is None:
                return number
            self._delivery.begin(record)
            self._accept_record(record, now)
        self._wake()  # there may be more
        return MAX_RECORDS_PER_TURN

    def _accept_alone(self, now: float) -> int:
        """Accept a record only when nothing else is in work; a suspect record after the commit of its marker."""
        if self._alone is not None:
            return self._accept_marked(self._alone, now) if self._alone.marked.done() else 0
        if self._job.num_active() > 0 or not self._delivery.settled():
            self._delivery.hurry()
            self._awaits_settled = True
            return 0
        record = self._inbox.take()
        if record is None:
            self._partitions.clear_exhausted()
            return 0
        verdict = self._partitions.verdict(record)
        if verdict == "free":
            self._delivery.begin(record)
            self._accept_record(record, now)
            return 1
        num_deaths = self._partitions.num_deaths_alone(record) if verdict == "culprit" else 0
        self._mark(record, num_deaths)
        return 0

    def _mark(self, record: Record, num_deaths: int) -> None:
        marked = self._partitions.mark_alone(record)
        self._alone = _Alone(record, num_deaths, marked)
        marked.add_done_callback(lambda _: self._wake())

    def _accept_marked(self, alone: _Alone, now: float) -> int:
        record, self._alone = alone.record, None
        try:
            alone.marked.result()
        except Transient as error:
            log.warning("marker of a suspect message not committed, trying again", error=str(error), **_ids(record))
            self._mark(record, alone.num_deaths)
            return 0
        self._delivery.begin(record)
        if alone.num_deaths == 0:
            self._accept_record(record, now)
            return 1
        died = Poison("worker_died", "the worker's process died while it handled this message alone")
        log.error("the process died while it handled this message alone", **_ids(record))
        if alone.num_deaths == 1:
            self._refuse(record, died, now)
        else:  # the process died even while it refused the message
            self._delivery.finish(self._dead_letter(record, died), now)
        return 1

    def _accept_record(self, record: Record, now: float) -> None:
        """Start work on a record; an exception becomes the record's outcome."""
        try:
            self._job.accept(record, now)
        except Exception as error:
            self._refuse(record, as_internal_error(error, **_ids(record)), now)

    def _refuse(self, record: Record, error: Poison, now: float) -> None:
        try:
            self._job.refuse(record, error, now)
        except Exception as second:
            # The job cannot write the record's outcome either: publish a dead letter without a reply.
            self._delivery.finish(self._dead_letter(record, as_internal_error(second, **_ids(record))), now)

    def _deliver(self, now: float) -> None:
        for finished in self._job.turn(now):
            self._delivery.finish(finished, now)

    def _note_revocations(self, now: float) -> None:
        for revocation in self._inbox.revocations():
            grace_s = 0.0 if revocation.lost else self._revoke_grace_s
            self._leaving.append(_Leaving(revocation, now + grace_s))
            if self._alone is not None and self._alone.record.partition in revocation.partitions:
                self._alone = None

    def _give_back(self, now: float) -> None:
        """Release the partitions whose messages are all committed, or whose grace time is over."""
        staying = []
        for leaving in self._leaving:
            partitions = leaving.revocation.partitions
            if not leaving.revocation.lost:
                if now < leaving.deadline and not self._delivery.settled(partitions):
                    self._delivery.hurry()
                    staying.append(leaving)
                    continue
                if leaving.left is None:
                    leaving.left = self._leave(partitions)
                if now < leaving.deadline + LEAVE_S and not leaving.left.done():
                    staying.append(leaving)
                    continue
            self._job.drop(partitions)
            self._delivery.drop(partitions)
            self._partitions.drop(partitions)
            leaving.revocation.release()
        self._leaving = staying

    def _leave(self, partitions: frozenset[Partition]) -> Future[None]:
        """Commit the orderly end of these partitions, and drop their work: a later commit could arrive first."""
        committing = set(self._delivery.committing())
        self._job.drop(partitions)
        self._delivery.drop(partitions)
        left = self._partitions.leave(partitions - committing)
        left.add_done_callback(lambda _: self._wake())
        return left

    def _begin_stop(self, now: float) -> None:
        if self._must_stop and not self._stopping:
            self._stopping = True
            self._stop_by = now + self._drain_grace_s
            self._alone = None
            self._inbox.hold()
            log.info("draining", active=self._job.num_active(), grace_s=self._drain_grace_s)

    def _has_ended(self, now: float) -> bool:
        if not self._stopping:
            return False
        if self._left is not None:
            return self._left.done() or now >= self._stop_by
        if self._job.num_active() == 0 and self._delivery.settled():
            log.info("drained")
        elif now >= self._stop_by:
            active = self._job.num_active()
            log.warning("drain grace is over; the next owner repeats the messages in work", active=active)
        else:
            return False
        self._left, self._stop_by = self._leave(self._inbox.assigned()), now + LEAVE_S
        return self._left.done()

    def _wait_s(self, now: float) -> float:
        waits = (
            self._job.wants_turn_in_s(now),
            self._delivery.wants_turn_in_s(now),
            self._partitions.wants_turn_in_s(now),
            MAX_WAIT_S,
        )
        return min(wait for wait in waits if wait is not None)


def _ids(record: Record) -> dict[str, object]:
    return {"topic": record.partition.topic, "partition": record.partition.number, "offset": record.offset}

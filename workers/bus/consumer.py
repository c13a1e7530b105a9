"""The consuming side of the bus: a member of a group, on its own thread.

Runs on a thread because a poll blocks: on the broker, or on a rebalance that waits for records in work. Polled records
wait in a short queue until the loop takes them. While the queue is full, all partitions are paused and polling goes on,
so that the group keeps this member.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import kafka.errors as kafka_errors
import structlog
from kafka import AsyncConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.future import Future as KafkaFuture

from workers.bus.arrivals import Arrivals
from workers.bus.assigned import AssignedPartitions
from workers.bus.clients import kafka_offsets, started, to_record
from workers.bus.errors import translating
from workers.bus.kafka_internals import (
    PollBudget,
    PollIsFull,
    clear_exhausted_partition,
    committed_offsets,
    continue_join,
    has_to_join,
    install_tolerant_records,
    is_joining,
    is_stable,
    request_unknown_partitions,
)
from workers.errors import Transient
from workers.ports import Assignment, Commit, Interval, Partition, Poll, Record, Revocation
from workers.retrying import is_worth_a_line

log = structlog.get_logger(__name__)

#: How long a poll waits for records; also the longest time until the thread notices that it has to stop.
POLL_S = 0.1
#: Interval of polls while the queue is full: they keep the membership and serve rebalances.
FULL_POLL_S = 0.5
COMMIT_TIMEOUT_S = 10.0
#: A heartbeat's answer announces a rebalance. At the client's default interval of 3 s, a partition that
#: changes its owner waits for up to two heartbeats; this interval costs two small requests a second.
HEARTBEAT_MS = 500
#: How long a killed member's partitions wait for a new owner, and readers for its open transaction. The client's
#: defaults (45 s and 60 s) are for consumers that may block; this one sends heartbeats from its IO thread.
SESSION_TIMEOUT_MS = 10_000
#: Bytes of records of one poll, and of one decompressed batch. The broker limits the size of compressed batches, and a
#: decompressed one may be a thousand times larger.
MAX_POLL_BYTES = 16 << 20
MAX_BATCH_BYTES = 64 << 20
#: Bytes of one answer to a fetch, still compressed.
MAX_FETCH_BYTES = 32 << 20


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Makes a rebalance wait until the loop has given the partitions back; awaits, so that heartbeats go on."""

    def __init__(self, inbox: KafkaInbox) -> None:
        self._inbox = inbox

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._inbox.note_revocation(revoked, lost=False)

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        await self._inbox.note_revocation(lost, lost=True)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._inbox.note_assignment(assigned)


class KafkaInbox:
    """A member of a consumer group that reads one topic; implements `workers.ports.Inbox`."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        *,
        topic: str,
        group_id: str,
        wake: Callable[[], None],
        read_committed: bool,
        max_poll_records: int,
        max_message_bytes: int,
        session_timeout_ms: int = SESSION_TIMEOUT_MS,
    ) -> None:
        """`connection` holds the settings that every client of this broker needs (`workers.bus.connection`)."""
        self._topic = topic
        self._wake = wake
        self._arrivals = Arrivals()
        self._lock = threading.Lock()
        self._revocations: list[Revocation] = []
        self._unreleased: list[KafkaFuture] = []
        self._error: BaseException | None = None
        self._joined = False
        self._held = False
        self._closing = False
        self._num_failures = 0
        self._consumer = started(
            KafkaConsumer,
            **connection,
            group_id=group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # a request published before the first worker is still answered
            isolation_level="read_committed" if read_committed else "read_uncommitted",
            partition_assignment_strategy=(CooperativeStickyAssignor,),
            max_poll_records=max_poll_records,
            heartbeat_interval_ms=HEARTBEAT_MS,
            session_timeout_ms=session_timeout_ms,
            fetch_max_bytes=max(MAX_FETCH_BYTES, max_message_bytes + (64 << 10)),
            max_partition_fetch_bytes=max(1 << 20, max_message_bytes + (64 << 10)),
        )
        self._budget = PollBudget(MAX_POLL_BYTES, max(MAX_BATCH_BYTES, max_message_bytes))
        install_tolerant_records(self._consumer, self._budget)
        self._assigned = AssignedPartitions(self._consumer)
        self._consumer.subscribe([topic], listener=_Listener(self))
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="kafka-commit")
        self._thread = threading.Thread(target=self._poll_until_closed, name="kafka-poll", daemon=True)
        self._thread.start()

    def take(self) -> Record | None:
        if self._error is not None:
            raise self._error
        return self._arrivals.take()

    def assignments(self) -> list[Assignment]:
        return self._assigned.offers()

    def open(self, assignment: Assignment, offset: int) -> None:
        self._assigned.open(assignment, offset)
        self._arrivals.notify()

    def revocations(self) -> list[Revocation]:
        with self._lock:
            revocations, self._revocations = self._revocations, []
            return revocations

    def commit(self, offsets: Mapping[Partition, Commit]) -> Future[None]:
        return self._committer.submit(self._commit, dict(offsets), self._assigned.num_assignments)

    def _commit(self, offsets: dict[Partition, Commit], num_assignments: int) -> None:
        if not offsets:
            return
        if num_assignments != self._assigned.num_assignments:
            # The commit waited for an earlier one; the broker would now accept it as a commit of the new membership.
            raise Transient("partitions were assigned before the offsets were committed")
        with translating():
            self._consumer.commit(kafka_offsets(offsets), timeout_ms=int(COMMIT_TIMEOUT_S * 1000))

    def joined(self) -> bool:
        return self._joined

    def assigned(self) -> frozenset[Partition]:
        return frozenset(Partition(*partition) for partition in self._consumer.assignment())

    def lag(self) -> Mapping[Partition, int]:
        waiting, unread = self._arrivals.count(), self._assigned.unread
        return {p: unread[p] + waiting[p] for p in self.assigned() if p in unread}

    def membership(self) -> Any:
        """The group membership by which the broker fences a transaction (KIP-447); opaque."""
        return self._consumer.group_metadata()

    def committed(self, partitions: Collection[Partition]) -> Mapping[Partition, Commit]:
        """Return the group's committed offsets, once no open transaction can change them. Raises `Transient`."""
        wanted = [TopicPartition(*partition) for partition in partitions]
        with translating():
            found = committed_offsets(self._consumer, wanted, COMMIT_TIMEOUT_S)
        return {Partition(*partition): Commit(at.offset, at.metadata or "") for partition, at in found.items()}

    def hold(self) -> None:
        self._held = True
        self._arrivals.hold()
        self._arrivals.notify()

    def close(self, timeout_s: float) -> None:
        give_up_at = time.monotonic() + timeout_s
        with self._lock:
            self._closing = True
            unreleased, self._unreleased = self._unreleased, []
        self._arrivals.notify()
        for released in unreleased:
            self._release(released)
        self._committer.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout_s)
        self._consumer.close(autocommit=False, timeout_ms=max(0, int((give_up_at - time.monotonic()) * 1000)))
        self._committer.shutdown(wait=True)  # closing the consumer has failed any commit in flight

    def _poll_until_closed(self) -> None:
        try:
            while not self._closing:
                if not self._must_join():
                    self._arrivals.wait_for_room(FULL_POLL_S, or_else=lambda: self._closing)
                self._poll()
        except BaseException as error:
            self._error = error
            self._wake()

    def _must_join(self) -> bool:
        """Whether a join is in progress or has to begin; while the inbox is held, none begins."""
        return is_joining(self._consumer) or (not self._held and has_to_join(self._consumer))

    def _poll(self) -> None:
        """Poll once; while the queue is full, with all partitions paused, only to keep the membership."""
        must_join = self._must_join()
        if self._held and not must_join:
            # Heartbeats need no poll. A join, which only a poll begins, would keep this member from committing until
            # every other member has joined too.
            self._arrivals.pause(POLL_S, until=lambda: self._closing)
            return
        is_full = self._arrivals.is_full()
        try:
            with translating():
                self._assigned.turn(self._wake)
                self._assigned.pause(all_of_them=is_full)
            self._fetch(FULL_POLL_S if must_join else 0.0 if is_full or not self._assigned.are_all_open() else POLL_S)
            with translating():
                self._look_after_membership()
            self._num_failures = 0
        except Transient as error:
            self._num_failures += 1
            if is_worth_a_line(self._num_failures):
                log.warning("reading failed, trying again", attempt=self._num_failures, error=str(error))
            self._arrivals.pause(POLL_S, until=lambda: self._closing)
        if not is_full and not must_join and not self._assigned.are_all_open():
            # A poll with every partition paused sleeps on when one is opened meanwhile.
            self._arrivals.pause(POLL_S, until=lambda: self._closing or self._assigned.is_opening())

    def _fetch(self, timeout_s: float) -> None:
        began_at = time.monotonic()
        self._budget.left = self._budget.max_bytes
        clear_exhausted_partition(self._consumer)
        try:
            with translating():
                polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000))
        except PollIsFull:  # raised for the previous poll
            return
        if polled:  # before anything can fail, because the consumer does not return them again
            self._put(polled, Interval(began_at, time.monotonic()))

    def _put(self, polled: Mapping[TopicPartition, list[Any]], interval: Interval) -> None:
        poll = Poll(interval, sum(map(len, polled.values())))
        for partition, records in polled.items():
            epoch = self._assigned.epoch_of(partition)
            if epoch is not None:  # else revoked meanwhile
                self._arrivals.put(to_record(Partition(*partition), record, epoch, poll) for record in records)
        self._wake()

    def _look_after_membership(self) -> None:
        continue_join(self._consumer)
        if not self._joined and is_stable(self._consumer):
            self._joined = True
            self._wake()
        if self._assigned.look_up_lag():
            request_unknown_partitions(self._consumer, self._topic)
            self._close_recreated()

    def _close_recreated(self) -> None:
        closed = self._assigned.close_recreated()
        if closed:
            partitions = frozenset(Partition(*partition) for partition in closed)
            self._arrivals.drop(partitions)
            with self._lock:
                self._revocations.append(Revocation(partitions, True, lambda: self._reopen(closed)))
            self._wake()

    def _reopen(self, closed: Collection[TopicPartition]) -> None:
        self._assigned.reopen(closed)
        self._arrivals.notify()

    def note_assignment(self, assigned: set[TopicPartition]) -> None:
        """Runs on Kafka's IO thread, inside a poll."""
        self._assigned.add(assigned)
        log.info("partitions assigned", partitions=sorted(f"{p.topic}-{p.partition}" for p in assigned))

    async def note_revocation(self, revoked: set[TopicPartition], *, lost: bool) -> None:
        """Runs on Kafka's IO thread, inside a poll: returns when the loop has released the partitions.

        Waits for lost partitions too: if they were assigned again before the loop has dropped their records, the loop
        would confuse old and repeated records.
        """
        partitions = frozenset(Partition(*partition) for partition in revoked)
        released = KafkaFuture()
        self._assigned.remove(revoked)
        self._arrivals.drop(partitions)
        with self._lock:
            if self._closing:
                return
            self._unreleased.append(released)
            self._revocations.append(Revocation(partitions, lost, lambda: self._release(released)))
        self._wake()
        await released

    def _release(self, released: KafkaFuture) -> None:
        with self._lock:
            if released in self._unreleased:
                self._unreleased.remove(released)
        if not released.is_done:
            released.success(None)
            # A future set from another thread does not wake Kafka's IO loop; an empty commit does.
            with contextlib.suppress(RuntimeError, kafka_errors.KafkaError):  # closed meanwhile, so nothing waits
                self._consumer.commit({}, timeout_ms=0)

"""The consuming side of the bus: a member of a group, on a thread of its own.

On a thread, because its poll blocks (on the broker, and on a rebalance that waits for messages in work); what it polls
waits in a short queue until the loop takes it. While the queue is full the partitions are paused and polling goes on,
so that the group keeps this member.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import kafka.errors as kafka_errors
import structlog
from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.future import Future as KafkaFuture

from workers.bus.clients import METADATA_MAX_AGE_MS, kafka_offsets, started, to_record
from workers.bus.errors import translating
from workers.bus.lag import LagLook
from workers.bus.membership import ask_for_partitions, go_on_joining, has_to_join, is_joining, is_stable
from workers.bus.records import let_go_of_drained, read_forgivingly
from workers.errors import Transient
from workers.ports import Interval, Partition, Poll, Record, Revocation

log = structlog.get_logger(__name__)

#: Records that wait for the loop before polling pauses; two polls' worth keeps the loop fed between polls.
MAX_WAITING_RECORDS = 256
#: The same bound for large records: an image event may carry the whole image.
MAX_WAITING_BYTES = 64 << 20
#: How long a poll waits for records; also how soon the thread notices that it is to stop.
POLL_S = 0.1
#: While the queue is full, a poll this often keeps the membership and serves rebalances.
FULL_POLL_S = 0.5
COMMIT_TIMEOUT_S = 10.0
#: A member learns of a rebalance from the answer to its heartbeat. At the client's default of 3 s a partition that
#: changes hands waits for up to two of them; this costs two small requests a second.
HEARTBEAT_MS = 500
#: A killed member's partitions stand still for so long, and readers of its open transaction wait. The client's own
#: defaults (45 s and 60 s) are for consumers that may pause; this one answers from its IO thread, twice a second.
SESSION_TIMEOUT_MS = 10_000


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Holds a rebalance until the loop has given the partitions back; awaits, so that heartbeats go on."""

    def __init__(self, inbox: KafkaInbox) -> None:
        self._inbox = inbox

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._inbox.note_revocation(revoked, lost=False)

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        await self._inbox.note_revocation(lost, lost=True)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        log.info("partitions assigned", partitions=sorted(f"{p.topic}-{p.partition}" for p in assigned))


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
        """`connection` is what every client of this broker needs (`workers.bus.connection`)."""
        self._topic = topic
        self._wake = wake
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting: deque[Record] = deque()
        self._waiting_bytes = 0
        self._revocations: list[Revocation] = []
        self._unreleased: list[KafkaFuture] = []
        self._error: BaseException | None = None
        self._joined = False
        self._held = False
        self._closing = False
        self._consumer = started(
            KafkaConsumer,
            **connection,
            group_id=group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # a request published before the first worker is still answered
            isolation_level="read_committed" if read_committed else "read_uncommitted",
            partition_assignment_strategy=(CooperativeStickyAssignor,),
            max_poll_records=max_poll_records,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
            session_timeout_ms=session_timeout_ms,
            max_partition_fetch_bytes=max(1 << 20, max_message_bytes + (64 << 10)),
        )
        read_forgivingly(self._consumer)
        self._lag = LagLook(self._consumer)
        self._consumer.subscribe([topic], listener=_Listener(self))
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="kafka-commit")
        self._thread = threading.Thread(target=self._poll_until_closed, name="kafka-poll", daemon=True)
        self._thread.start()

    def take(self) -> Record | None:
        if self._error is not None:
            raise self._error
        with self._lock:
            if not self._waiting:
                return None
            was_low = self._is_low()
            record = self._waiting.popleft()
            self._waiting_bytes -= record.num_bytes()
            if self._is_low() and not was_low:
                self._room.notify()
            return record

    def _is_low(self) -> bool:
        return len(self._waiting) <= MAX_WAITING_RECORDS // 2 and self._waiting_bytes <= MAX_WAITING_BYTES // 2

    def _is_full(self) -> bool:
        return len(self._waiting) >= MAX_WAITING_RECORDS or self._waiting_bytes >= MAX_WAITING_BYTES

    def revocations(self) -> list[Revocation]:
        with self._lock:
            revocations, self._revocations = self._revocations, []
            return revocations

    def commit(self, offsets: Mapping[Partition, int]) -> Future[None]:
        return self._committer.submit(self._commit, dict(offsets))

    def _commit(self, offsets: dict[Partition, int]) -> None:
        with translating():
            self._consumer.commit(kafka_offsets(offsets), timeout_ms=int(COMMIT_TIMEOUT_S * 1000))

    def joined(self) -> bool:
        return self._joined

    def assigned(self) -> frozenset[Partition]:
        return frozenset(Partition(*partition) for partition in self._consumer.assignment())

    def lag(self) -> Mapping[Partition, int]:
        with self._lock:
            waiting = Counter(record.partition for record in self._waiting)
        beyond = self._lag.beyond
        return {p: beyond[p] + waiting[p] for p in self.assigned() if p in beyond}

    def membership(self) -> Any:
        """What a transaction needs so that the broker can fence it (KIP-447); opaque."""
        return self._consumer.group_metadata()

    def hold(self) -> None:
        with self._lock:
            self._held = True
            self._waiting.clear()
            self._waiting_bytes = 0
            self._room.notify()

    def close(self, timeout_s: float) -> None:
        give_up_at = time.monotonic() + timeout_s
        with self._lock:
            self._closing = True
            unreleased, self._unreleased = self._unreleased, []
            self._room.notify()
        for released in unreleased:
            self._release(released)
        self._committer.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout_s)
        self._consumer.close(autocommit=False, timeout_ms=max(0, int((give_up_at - time.monotonic()) * 1000)))
        self._committer.shutdown(wait=True)  # with the consumer closed a commit in flight has failed

    def _poll_until_closed(self) -> None:
        try:
            while not self._closing:
                self._wait_for_room()
                self._poll()
        except BaseException as error:
            self._error = error
            self._wake()

    def _wait_for_room(self) -> None:
        with self._lock:
            if (self._held or self._is_full()) and not self._closing and not self._must_join():
                self._room.wait(FULL_POLL_S)

    def _must_join(self) -> bool:
        """Whether polls are to follow each other and to wait; while it holds, a member begins no join."""
        return is_joining(self._consumer) or (not self._held and has_to_join(self._consumer))

    def _poll(self) -> None:
        """Poll once; while the queue is full only for the group's sake, with everything paused."""
        must_join = self._must_join()
        if self._held and not must_join:
            # Heartbeats go on without. A join, which only a poll begins, would keep this member from committing until
            # the last of the others has joined as well.
            return
        full = self._held or self._is_full()
        assigned = self._consumer.assignment()
        if full:
            self._consumer.pause(*assigned)
        elif self._consumer.paused():
            self._consumer.resume(*self._consumer.paused())
        timeout_s = FULL_POLL_S if must_join else 0.0 if full else POLL_S
        began_at = time.monotonic()
        try:
            with translating():
                let_go_of_drained(self._consumer)
                polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000))
            # Before anything else may fail: the consumer does not bring them a second time.
            if polled:
                self._put(polled, Interval(began_at, time.monotonic()))
            with translating():
                self._look_after_membership()
        except Transient as error:
            log.warning("kafka poll failed, trying again", error=str(error))
            with self._lock:
                self._room.wait(POLL_S)

    def _put(self, polled: Mapping[TopicPartition, list[Any]], interval: Interval) -> None:
        poll = Poll(interval, sum(map(len, polled.values())))
        with self._lock:
            if self._held:  # meanwhile: they are not committed, and the next owner reads them
                return
            for partition, records in polled.items():
                arrived = [to_record(Partition(*partition), record, poll) for record in records]
                self._waiting.extend(arrived)
                self._waiting_bytes += sum(record.num_bytes() for record in arrived)
        self._wake()

    def _look_after_membership(self) -> None:
        go_on_joining(self._consumer)
        if not self._joined and is_stable(self._consumer):
            self._joined = True
            self._wake()
        if self._lag.is_due():
            ask_for_partitions(self._consumer, self._topic)
            self._lag.look()

    async def note_revocation(self, revoked: set[TopicPartition], *, lost: bool) -> None:
        """Runs on Kafka's IO thread, inside a poll: returns when the loop has released the partitions.

        Also where they are lost: were they assigned again before the loop has dropped its messages, it would take
        the repeated ones for those.
        """
        partitions = frozenset(Partition(*partition) for partition in revoked)
        released = KafkaFuture()
        with self._lock:
            self._waiting = deque(record for record in self._waiting if record.partition not in partitions)
            self._waiting_bytes = sum(record.num_bytes() for record in self._waiting)
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
            # A future set from another thread does not wake Kafka's IO loop; a commit of nothing does.
            with contextlib.suppress(RuntimeError, kafka_errors.KafkaError):  # closed meanwhile: nobody waits any more
                self._consumer.commit({}, timeout_ms=0)

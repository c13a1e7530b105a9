"""Workers over the in-memory broker, stepped by one seeded scheduler: the real loop, partitions, ledger and deliveries.

The job answers each record after a random number of turns. Everything that may fail or wait in the world does so by the
seed: acknowledgements are late, sends and commits fail, the broker is away, the clock jumps, partitions move to another
worker, workers crash and are restarted.
"""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Executor, Future
from unittest.mock import Mock

from workers.at_least_once import AtLeastOnce
from workers.bus.memory import MemoryBroker, MemoryInbox, MemoryTransactionalOutbox
from workers.delivery import UndeliveredLimits
from workers.errors import Poison, TooLarge, Transient
from workers.exactly_once import ExactlyOnce
from workers.loop import Loop, Wake
from workers.partitions import Partitions
from workers.ports import Finished, Outgoing, Partition, Record
from workers.telemetry.bus_spans import BusSpans

NUM_PARTITIONS = 3
#: Records that a job has in work at most.
MAX_IN_WORK = 8
LIMITS = UndeliveredLimits(max_messages=6, max_bytes=10_000)


class Crash(BaseException):
    """The end of a worker's process."""


class SimulatedJob:
    """Answers each record with its value, later; some values raise, and some end the process."""

    def __init__(self, chance: random.Random, killers: set[bytes], broken: set[bytes]) -> None:
        self.chance, self.killers, self.broken = chance, killers, broken
        self.active: list[Record] = []
        self.finished: list[Finished] = []

    def has_room(self) -> bool:
        return len(self.active) + len(self.finished) < MAX_IN_WORK

    def accept(self, record: Record, now: float) -> None:
        if record.value in self.killers:
            raise Crash
        self.active.append(record)
        if record.value in self.broken:
            raise ZeroDivisionError

    def refuse(self, record: Record, error: Poison, now: float) -> None:
        self.active = [active for active in self.active if active is not record]
        self.finished.append(answer(record, error.code.encode()))

    def turn(self, now: float) -> list[Finished]:
        for record in list(self.active):
            if self.chance.random() < 0.5:
                self.active.remove(record)
                self.finished.append(answer(record, record.value or b""))
        finished, self.finished = self.finished, []
        return finished

    def wants_turn_in_s(self, now: float) -> float | None:
        return 0.0 if self.active or self.finished else None

    def drop(self, partitions) -> None:
        self.active = [record for record in self.active if record.partition not in partitions]
        self.finished = [done for done in self.finished if done.record.partition not in partitions]

    def num_active(self) -> int:
        return len(self.active)


def answer(record: Record, content: bytes) -> Finished:
    """The reply to a record: its key, and what became of it; a large one is refused and replaced."""
    small = Outgoing("out", record.key, b"small " + content)
    reply = Outgoing("out", record.key, content, if_refused=lambda refused: small)
    return Finished(record, (reply,))


class SimulatedInbox(MemoryInbox):
    """Commits late, fail at times, and have no effect for partitions that were lost."""

    def __init__(self, world: World) -> None:
        self.generation = 0  # of the membership: a rebalance fences what was begun before it
        super().__init__(world.broker, topic="in", group_id="g", partitions=())
        self.world = world
        self.waiting: list[tuple[Future[None], dict, int]] = []

    def gain(self, numbers):
        if numbers:
            self.generation += 1
        super().gain(numbers)

    def commit(self, offsets):
        future: Future[None] = Future()
        self.waiting.append((future, dict(offsets), self.generation))
        return future

    def step(self) -> None:
        while self.waiting and self.world.chance.random() < 0.7:
            future, offsets, generation = self.waiting.pop(0)
            is_ours = set(offsets) <= (self.assigned() | self.world.leaving(self)) and generation == self.generation
            if not is_ours or self.world.broker.away or self.world.chance.random() < self.world.trouble:
                future.set_exception(Transient("not committed"))
            else:
                super().commit(offsets)
                future.set_result(None)


class SimulatedOutbox:
    """Messages arrive late, or not; what failed may have arrived."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.waiting: list[tuple[Outgoing, Future[None]]] = []

    def send(self, message: Outgoing) -> Future[None]:
        self.waiting.append((message, Future()))
        return self.waiting[-1][1]

    def step(self) -> None:
        chance = self.world.chance
        for message, future in list(self.waiting):
            if chance.random() < 0.4:
                continue
            self.waiting.remove((message, future))
            if self.world.broker.away:
                future.set_exception(Transient("the broker is away"))
            elif (message.value or b"").startswith(b"large"):
                future.set_exception(TooLarge("no"))
            else:
                fails = chance.random() < self.world.trouble
                if not fails or chance.random() < 0.5:
                    self.world.broker.append(message)
                if fails:
                    future.set_exception(Transient("no answer"))
                else:
                    future.set_result(None)

    def close(self, timeout_s: float) -> None:
        """Nothing is held open."""


class SimulatedTransactions(MemoryTransactionalOutbox):
    """A transaction of a partition that was lost is fenced, and others fail at times."""

    def __init__(self, world: World, inbox: SimulatedInbox) -> None:
        super().__init__(world.broker, group_id="g")
        self.world, self.inbox = world, inbox
        self.began_in = 0  # the generation in which the transaction was begun

    def publish(self, messages, offsets):
        is_ours = set(offsets) <= (self.inbox.assigned() | self.world.leaving(self.inbox))
        if not is_ours or self.inbox.generation != self.began_in:
            raise Transient("fenced")
        for number, message in enumerate(messages):
            if (message.value or b"").startswith(b"large"):
                raise TooLarge("no", number)
        if self.world.chance.random() < self.world.trouble:
            raise Transient("aborted")
        super().publish(messages, offsets)


class SimulatedExecutor(Executor):
    """Runs what was submitted when the scheduler says so."""

    def __init__(self, world: World, transactions: SimulatedTransactions) -> None:
        self.world, self.transactions = world, transactions
        self.waiting: list = []

    def submit(self, call, /, *args, **kwargs):
        future: Future = Future()
        self.waiting.append((future, call, self.transactions.inbox.generation))
        return future

    def step(self) -> None:
        while self.waiting and self.world.chance.random() < 0.6:
            future, call, self.transactions.began_in = self.waiting.pop(0)
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)


class SimulatedWorker:
    """One process."""

    def __init__(self, world: World) -> None:
        wake, metrics = Wake(), Mock()
        self.inbox = SimulatedInbox(world)
        self.job = SimulatedJob(world.chance, world.killers, world.broken)
        self.partitions = Partitions(self.inbox, wake)
        transactions = SimulatedTransactions(world, self.inbox)
        self.outbox, self.executor = SimulatedOutbox(world), SimulatedExecutor(world, transactions)
        if world.exactly_once:
            self.delivery = ExactlyOnce(
                transactions, self.executor, self.partitions, wake, 0.05, metrics, BusSpans.off(), LIMITS
            )
        else:
            self.delivery = AtLeastOnce(
                self.inbox, self.outbox, self.partitions, wake, 0.1, metrics, BusSpans.off(), LIMITS
            )
        self.loop = Loop(
            inbox=self.inbox,
            job=self.job,
            delivery=self.delivery,
            partitions=self.partitions,
            dead_letter=lambda record, error: answer(record, error.code.encode()),
            wake=wake,
            clock=lambda: world.now,
            drain_grace_s=5.0,
            revoke_grace_s=2.0,
        )


class World:
    """The broker, the clock, the workers and everything that happens to them, by one seed."""

    def __init__(self, seed: int, *, exactly_once: bool) -> None:
        self.chance = random.Random(seed)
        self.exactly_once = exactly_once
        self.broker = MemoryBroker(num_partitions=NUM_PARTITIONS)
        self.now = 1000.0
        self.trouble = self.chance.choice([0.0, 0.05, 0.3])
        self.killers: set[bytes] = set()
        self.broken: set[bytes] = set()
        self.sent: dict[bytes, bytes] = {}
        self.workers = [SimulatedWorker(self), SimulatedWorker(self)]
        self.moving: dict[int, SimulatedWorker] = {}  # revoked and not yet released, with the owner
        self.free = set(range(NUM_PARTITIONS))

    def leaving(self, inbox: SimulatedInbox) -> set[Partition]:
        return {Partition("in", number) for number, owner in self.moving.items() if owner.inbox is inbox}

    def run(self, num_steps: int = 120) -> None:
        """Let things happen, then let everything settle."""
        for _ in range(num_steps):
            self.happen()
            self.step()
        self.trouble, self.broker.away = 0.0, False
        for _ in range(4000):
            if self.is_quiet():
                return
            self.step()
        raise AssertionError(f"something waits for ever: {self.unanswered()}")

    def happen(self) -> None:
        chance = self.chance.random()
        if chance < 0.45:
            self.publish()
        elif chance < 0.50:
            self.broker.away = not self.broker.away
        elif chance < 0.55:
            self.now += self.chance.choice([-0.0, 1.0, 30.0, 3600.0])
        elif chance < 0.62:
            self.revoke(lost=self.chance.random() < 0.3)
        elif chance < 0.65:
            self.crash(self.chance.randrange(len(self.workers)))

    def publish(self) -> None:
        number = len(self.sent)
        key, kind = b"r-%d" % number, self.chance.random()
        value = b"%d" % number
        if kind < 0.02 and not self.killers:
            self.killers.add(value)
        elif kind < 0.07:
            self.broken.add(value)
        elif kind < 0.12:
            value = b"large %d" % number
        self.sent[key] = value
        self.broker.away, away = False, self.broker.away
        self.broker.append(Outgoing("in", key, value))
        self.broker.away = away

    def revoke(self, *, lost: bool) -> None:
        owner = self.chance.choice(self.workers)
        numbers = [partition.number for partition in owner.inbox.assigned()]
        if numbers:
            number = self.chance.choice(numbers)
            self.moving[number] = owner
            if lost:
                del self.moving[number]
            owner.inbox.lose([number], lost=lost)
            revocation = owner.inbox._revocations.pop()
            release = type(revocation)(revocation.partitions, lost, lambda: self.release(number))
            owner.inbox._revocations.append(release)

    def release(self, number: int) -> None:
        self.moving.pop(number, None)
        self.free.add(number)

    def crash(self, index: int) -> None:
        worker = self.workers[index]
        for message, _ in worker.outbox.waiting:  # what was on its way may arrive
            if self.chance.random() < 0.5 and not (message.value or b"").startswith(b"large"):
                self.broker.append(message)
        self.free |= {partition.number for partition in worker.inbox.assigned()}
        self.free |= {number for number, owner in self.moving.items() if owner is worker}
        self.free |= {
            partition.number
            for leaving in [*worker.loop._leaving]
            for partition in leaving.revocation.partitions
            if not any(partition in other.inbox.assigned() for other in self.workers if other is not worker)
        }
        self.free |= {p.number for revocation in worker.inbox._revocations for p in revocation.partitions}
        self.moving = {number: owner for number, owner in self.moving.items() if owner is not worker}
        self.workers[index] = SimulatedWorker(self)

    def step(self) -> None:
        self.now += self.chance.choice([0.0, 0.01, 0.1, 0.5])
        for number in sorted(self.free):
            self.free.discard(number)
            self.chance.choice(self.workers).inbox.gain([number])
        for index, worker in enumerate(list(self.workers)):
            worker.inbox.step()
            worker.outbox.step()
            worker.executor.step()
            try:
                worker.loop.turn()
            except Crash:
                self.crash(index)
        self.check()

    def check(self) -> None:
        """What holds at every moment: no offset is committed before its record has an answer."""
        answered = {record.key for record in self.broker.log("out")}
        for (_, partition), commit in self.broker.committed.items():
            for record in self.broker.partition_log(*partition)[: commit.offset]:
                assert record.key in answered, f"{record.key!r} is committed and not answered"
        for worker in self.workers:
            undelivered = worker.delivery._undelivered
            assert undelivered.num_messages <= LIMITS.max_messages + MAX_IN_WORK, "undelivered outcomes are unbounded"

    def unanswered(self) -> set[bytes]:
        return set(self.sent) - {record.key for record in self.broker.log("out")}

    def is_quiet(self) -> bool:
        committed = {partition.number: commit.offset for (_, partition), commit in self.broker.committed.items()}
        ends = {n: len(self.broker.partition_log("in", n)) for n in range(NUM_PARTITIONS)}
        return all(committed.get(n, 0) == end for n, end in ends.items()) and all(
            worker.delivery.settled() and worker.job.num_active() == 0 for worker in self.workers
        )

    def verify(self) -> None:
        """What holds at the end: one outcome per message, and the bounds balance."""
        replies = self.broker.log("out")
        assert self.unanswered() == set()
        by_key: dict[bytes | None, set[bytes | None]] = {}
        for record in replies:
            by_key.setdefault(record.key, set()).add(record.value)
        for key, values in by_key.items():
            # Three crashes from outside without progress look like a message that kills.
            assert len(values - {b"worker_died"}) <= 1, f"{key!r} has several outcomes: {values}"
        if self.exactly_once:
            twice = [key for key, count in Counter(record.key for record in replies).items() if count > 1]
            assert twice == [], f"answered twice: {twice}"
        for worker in self.workers:
            undelivered = worker.delivery._undelivered
            assert (undelivered.num_messages, undelivered.num_bytes) == (0, 0)

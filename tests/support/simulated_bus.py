"""The simulated surroundings of a worker process: its consumer group, its sends, its transactions and its threads.

A world with one seeded source of chance owns them. Acknowledgements are late, sends and commits fail, partitions move
between workers, and what runs on other threads in production runs here when the world steps it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import Any, Protocol

from workers.at_least_once import AtLeastOnce
from workers.bus.memory import MemoryBroker, MemoryInbox, MemoryTransactionalOutbox
from workers.delivery import UndeliveredLimits
from workers.errors import Poison, TooLarge, Transient
from workers.exactly_once import ExactlyOnce
from workers.loop import Loop, Wake
from workers.partitions import Partitions
from workers.ports import Finished, Job, Outgoing, Partition, Record
from workers.telemetry.bus_spans import BusSpans

NUM_PARTITIONS = 3
LIMITS = UndeliveredLimits(max_messages=6, max_bytes=10_000)


class Crash(BaseException):
    """The end of a worker's process."""


class Again(BaseException):
    """A task that waits for a port which is away; its executor runs it again later."""


class Surroundings(Protocol):
    """What the parts of a worker need of their world."""

    chance: random.Random
    now: float
    trouble: float  # the probability that a call of a port fails
    exactly_once: bool
    broker: MemoryBroker
    metrics: Any


class SimulatedBroker(MemoryBroker):
    """Stamps records with the world's clock, and reports each one."""

    def __init__(self, clock: Callable[[], float], on_record: Callable[[Record], None]) -> None:
        super().__init__(num_partitions=NUM_PARTITIONS)
        self._clock, self._on_record = clock, on_record

    def append(self, message: Outgoing) -> Record:
        log = self.partition_log(*super().append(message).partition)
        log[-1] = replace(log[-1], timestamp_ms=int(self._clock() * 1000))
        self._on_record(log[-1])
        return log[-1]


class SimulatedInbox(MemoryInbox):
    """Commits late, fail at times, and have no effect for partitions that were lost."""

    def __init__(self, world: Surroundings, group: Group) -> None:
        self.generation = 0  # of the membership: a rebalance fences what was begun before it
        super().__init__(world.broker, topic=group.topic, group_id=group.group_id, partitions=())
        self.world, self.group = world, group
        self.waiting: list[tuple[Future[None], dict, int]] = []

    def gain(self, numbers):
        if numbers:
            self.generation += 1
        super().gain(numbers)

    def take(self):
        positions = list(self._positions.items())
        self.world.chance.shuffle(positions)  # partitions are read in any order
        self._positions = dict(positions)
        return super().take()

    def commit(self, offsets):
        future: Future[None] = Future()
        self.waiting.append((future, dict(offsets), self.generation))
        return future

    def step(self) -> None:
        while self.waiting and self.world.chance.random() < 0.7:
            future, offsets, generation = self.waiting.pop(0)
            is_ours = self.group.holds(self, offsets) and generation == self.generation
            if not is_ours or self.world.broker.away or self.world.chance.random() < self.world.trouble:
                future.set_exception(Transient("not committed"))
            else:
                super().commit(offsets)
                future.set_result(None)


class SimulatedOutbox:
    """Messages arrive late, or not; what failed may have arrived."""

    def __init__(self, world: Surroundings) -> None:
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
            elif is_large(message):
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


def is_large(message: Outgoing) -> bool:
    return (message.value or b"").startswith(b"large")


class SimulatedTransactions(MemoryTransactionalOutbox):
    """A transaction of a partition that was lost is fenced, and others fail at times."""

    def __init__(self, world: Surroundings, inbox: SimulatedInbox) -> None:
        super().__init__(world.broker, group_id=inbox.group.group_id)
        self.world, self.inbox = world, inbox
        self.began_in = 0  # the generation in which the transaction was begun

    def publish(self, messages, offsets):
        if not self.inbox.group.holds(self.inbox, offsets) or self.inbox.generation != self.began_in:
            raise Transient("fenced")
        for number, message in enumerate(messages):
            if is_large(message):
                raise TooLarge("no", number)
        if self.world.chance.random() < self.world.trouble:
            raise Transient("aborted")
        super().publish(messages, offsets)


class TransactionExecutor(Executor):
    """Runs transactions in order, each in the generation in which it was submitted."""

    def __init__(self, world: Surroundings, transactions: SimulatedTransactions) -> None:
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


class SimulatedExecutor(Executor):
    """A pool of threads whose tasks run when the world steps it; with several threads, in any order.

    While a task runs, the world may step other parts and other tasks, as other threads would run.
    """

    def __init__(self, world: Surroundings, num_threads: int = 1) -> None:
        self.world, self.num_threads = world, num_threads
        self.waiting: list[tuple[Future, Callable[[], Any]]] = []
        self.num_running = 0

    def submit(self, call, /, *args, **kwargs):
        future: Future = Future()
        self.waiting.append((future, lambda: call(*args, **kwargs)))
        return future

    def step(self) -> None:
        chance = self.world.chance
        while self.waiting and self.num_running < self.num_threads and chance.random() < 0.6:
            number = chance.randrange(min(len(self.waiting), self.num_threads - self.num_running))
            self._run(*self.waiting.pop(number))

    def _run(self, future: Future, call: Callable[[], Any]) -> None:
        self.num_running += 1
        try:
            result = call()
        except Again:
            self.waiting.insert(0, (future, call))
        except AssertionError:
            raise  # found by the world, which was stepped meanwhile
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            self.num_running -= 1


class SimulatedRetry:
    """Stands in for `workers.retrying.Retry`: a call that fails is made again with its task, later."""

    def __call__(self, what: str, call: Callable[[], Any], *, stop: Any = None) -> Any:
        try:
            return call()
        except Transient:
            raise Again from None

    def stop(self) -> None:
        """No call waits."""


class SimulatedWorker:
    """One process: a job with the real loop, partitions and delivery."""

    def __init__(
        self,
        world: Surroundings,
        group: Group,
        job: Job,
        dead_letter: Callable[[Record, Poison], Finished],
        steppable: Sequence[Any] = (),
    ) -> None:
        """`steppable` are the executors and other asynchronous parts of the job."""
        wake = Wake()
        self.is_dead = False
        self.job = job
        self.inbox = SimulatedInbox(world, group)
        self.partitions = Partitions(self.inbox, wake)
        transactions = SimulatedTransactions(world, self.inbox)
        self.outbox, executor = SimulatedOutbox(world), TransactionExecutor(world, transactions)
        self.steppable = [self.inbox, self.outbox, executor, *steppable]
        if world.exactly_once:
            self.delivery = ExactlyOnce(
                transactions, executor, self.partitions, wake, 0.05, world.metrics, BusSpans.off(), LIMITS
            )
        else:
            self.delivery = AtLeastOnce(
                self.inbox, self.outbox, self.partitions, wake, 0.1, world.metrics, BusSpans.off(), LIMITS
            )
        self.loop = Loop(
            inbox=self.inbox,
            job=job,
            delivery=self.delivery,
            partitions=self.partitions,
            dead_letter=dead_letter,
            wake=wake,
            clock=lambda: world.now,
            drain_grace_s=5.0,
            revoke_grace_s=2.0,
        )

    def step(self) -> None:
        """Let the asynchronous parts go on, then turn the loop. Raises `Crash`."""
        for part in self.steppable:
            if not self.is_dead:
                part.step()
        if not self.is_dead:
            self.loop.turn()

    def die(self) -> list[Outgoing]:
        """End the process; returns the messages that were on their way to the broker."""
        self.is_dead = True
        under_way = [message for message, _ in self.outbox.waiting]
        for part in self.steppable:
            part.waiting.clear()
        return under_way

    def is_losing(self, partition: Partition) -> bool:
        """Whether a revocation of this partition waits for the worker."""
        revocations = [*self.inbox._revocations, *(leaving.revocation for leaving in self.loop._leaving)]
        return any(partition in revocation.partitions for revocation in revocations)

    def is_settled(self) -> bool:
        return self.delivery.settled() and self.job.num_active() == 0

    def verify(self) -> None:
        undelivered = self.delivery._undelivered
        assert (undelivered.num_messages, undelivered.num_bytes) == (0, 0)


class Group:
    """The consumer group of one topic: its workers, and which of them has which partition."""

    def __init__(
        self, world: Surroundings, topic: str, group_id: str, start: Callable[[Group], SimulatedWorker]
    ) -> None:
        self.world, self.topic, self.group_id = world, topic, group_id
        self._start = start
        self.moving: dict[int, SimulatedWorker] = {}  # revoked and not yet released, with the owner
        self.free = set(range(NUM_PARTITIONS))
        self.workers = [start(self), start(self)]

    def holds(self, inbox: SimulatedInbox, partitions) -> bool:
        """Whether offsets of these partitions may still be committed by this member."""
        leaving = {Partition(self.topic, number) for number, owner in self.moving.items() if owner.inbox is inbox}
        return set(partitions) <= (inbox.assigned() | leaving)

    def revoke(self, *, lost: bool) -> None:
        """Take a partition away from a worker; a lost one may have its next owner before the former one knows."""
        chance = self.world.chance
        owner = chance.choice(self.workers)
        numbers = sorted(partition.number for partition in owner.inbox.assigned())
        if not numbers:
            return
        number = chance.choice(numbers)
        owner.inbox.lose([number], lost=lost)
        revocation = owner.inbox._revocations.pop()
        if lost:
            self.free.add(number)
        else:
            self.moving[number] = owner
            revocation = replace(revocation, release=lambda: self._release(number, owner))
        owner.inbox._revocations.append(revocation)

    def _release(self, number: int, owner: SimulatedWorker) -> None:
        if self.moving.get(number) is owner:
            del self.moving[number]
            self.free.add(number)

    def _assign(self) -> None:
        for number in sorted(self.free):
            members = [worker for worker in self.workers if not worker.is_losing(Partition(self.topic, number))]
            if members:
                self.free.discard(number)
                self.world.chance.choice(members).inbox.gain([number])

    def crash(self, worker: SimulatedWorker) -> None:
        """End a worker's process and start another."""
        if worker.is_dead:
            return
        for message in worker.die():
            if self.world.chance.random() < 0.5 and not is_large(message):
                self.world.broker.append(message)
        self.free |= {partition.number for partition in worker.inbox.assigned()}
        self.free |= {number for number, owner in self.moving.items() if owner is worker}
        self.moving = {number: owner for number, owner in self.moving.items() if owner is not worker}
        self.workers[self.workers.index(worker)] = self._start(self)

    def step(self) -> None:
        self._assign()
        for worker in list(self.workers):
            try:
                worker.step()
            except Crash:
                self.crash(worker)

    def is_quiet(self) -> bool:
        """Whether every record has been committed and no worker has work."""
        for number in range(NUM_PARTITIONS):
            commit = self.world.broker.committed.get((self.group_id, Partition(self.topic, number)))
            if (0 if commit is None else commit.offset) != len(self.world.broker.partition_log(self.topic, number)):
                return False
        return all(worker.is_settled() for worker in self.workers)

    def owner_of(self, number: int) -> SimulatedWorker | None:
        partition = Partition(self.topic, number)
        return next((worker for worker in self.workers if partition in worker.inbox.assigned()), None)

    def check_bounds(self, max_in_work: int) -> None:
        for worker in self.workers:
            num_messages = worker.delivery._undelivered.num_messages
            assert num_messages <= LIMITS.max_messages + max_in_work, "undelivered outcomes are unbounded"

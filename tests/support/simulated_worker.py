"""Workers with a scripted job over the in-memory broker, stepped by one seeded scheduler.

The job answers each record after a random number of turns. Everything that may fail or wait in the world does so by the
seed: acknowledgements are late, sends and commits fail, the broker is away, the clock jumps, partitions move to another
worker, workers crash and are restarted.
"""

from __future__ import annotations

import random
from collections import Counter
from unittest.mock import Mock

from simulated_bus import Crash, Group, SimulatedBroker, SimulatedWorker
from workers.errors import Poison
from workers.ports import Finished, Outgoing, Record

#: Records that a job has in work at most.
MAX_IN_WORK = 8


class ScriptedJob:
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
        self.finished.append(answer(record, error))

    def turn(self, now: float) -> list[Finished]:
        for record in list(self.active):
            if self.chance.random() < 0.5:
                self.active.remove(record)
                self.finished.append(reply(record, record.value or b""))
        finished, self.finished = self.finished, []
        return finished

    def wants_turn_in_s(self, now: float) -> float | None:
        return 0.0 if self.active or self.finished else None

    def drop(self, partitions) -> None:
        self.active = [record for record in self.active if record.partition not in partitions]
        self.finished = [done for done in self.finished if done.record.partition not in partitions]

    def num_active(self) -> int:
        return len(self.active)


def reply(record: Record, content: bytes) -> Finished:
    """The reply to a record: its key, and what became of it; a large one is refused and replaced."""
    small = Outgoing("out", record.key, b"small " + content)
    return Finished(record, (Outgoing("out", record.key, content, if_refused=lambda refused: small),))


def answer(record: Record, error: Poison) -> Finished:
    return reply(record, error.code.encode())


class World:
    """The broker, the clock, the workers and everything that happens to them, by one seed."""

    def __init__(self, seed: int, *, exactly_once: bool) -> None:
        self.chance = random.Random(seed)
        random.seed(seed)  # for the jitter of retries
        self.exactly_once = exactly_once
        self.metrics = Mock()
        self.answered: set[bytes | None] = set()
        self.broker = SimulatedBroker(lambda: self.now, self._note)
        self.now = 1000.0
        self.trouble = self.chance.choice([0.0, 0.05, 0.3])
        self.killers: set[bytes] = set()
        self.broken: set[bytes] = set()
        self.sent: dict[bytes, bytes] = {}
        self.group = Group(self, "in", "g", self._start)

    def _start(self, group: Group) -> SimulatedWorker:
        return SimulatedWorker(self, group, ScriptedJob(self.chance, self.killers, self.broken), answer)

    def _note(self, record: Record) -> None:
        if record.partition.topic == "out":
            self.answered.add(record.key)

    def run(self, num_steps: int = 120) -> None:
        """Let things happen, then let everything settle."""
        for _ in range(num_steps):
            self.happen()
            self.step()
        self.trouble, self.broker.away = 0.0, False
        for _ in range(4000):
            if self.group.is_quiet():
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
            self.group.revoke(lost=self.chance.random() < 0.3)
        elif chance < 0.65:
            self.group.crash(self.chance.choice(self.group.workers))

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
        self.broker.append(Outgoing("in", key, value))

    def step(self) -> None:
        self.now += self.chance.choice([0.0, 0.01, 0.1, 0.5])
        self.group.step()
        self.check()

    def check(self) -> None:
        """What holds at every moment: no offset is committed before its record has an answer."""
        for (_, partition), commit in self.broker.committed.items():
            for record in self.broker.partition_log(*partition)[: commit.offset]:
                assert record.key in self.answered, f"{record.key!r} is committed and not answered"
        self.group.check_bounds(MAX_IN_WORK)

    def unanswered(self) -> set[bytes]:
        return set(self.sent) - self.answered

    def verify(self) -> None:
        """Check the end state: one outcome per message, and no message counted as undelivered."""
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
        for worker in self.group.workers:
            worker.verify()

"""Whatever a seed lets happen, every message gets its one outcome and nothing waits for ever.

`make simulate SEEDS=100000` tries more seeds; the message of a failure names its seed, which SEED=… SEEDS=1 repeats.
"""

from __future__ import annotations

import os
from concurrent.futures import Future

import pytest

from simulated_worker import World
from workers.at_least_once import AtLeastOnce
from workers.delivery import Undelivered
from workers.ledger import Ledger
from workers.partitions import Partitions

SEEDS = int(os.environ.get("SEEDS", "1000"))
FIRST_SEED = int(os.environ.get("SEED", "0"))
#: Seeds within which a planted fault has to be found.
PLANTED_SEEDS = 300

pytestmark = pytest.mark.timeout(3600)


class Silent:
    """A log that writes nothing: thousands of outages are simulated."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def _silent(monkeypatch):
    for module in ("loop", "delivery", "errors", "partitions", "exactly_once"):
        monkeypatch.setattr(f"workers.{module}.log", Silent())


def run(seed: int, *, exactly_once: bool) -> None:
    world = World(seed, exactly_once=exactly_once)
    world.run()
    world.verify()


@pytest.mark.parametrize("exactly_once", [False, True], ids=["at_least_once", "exactly_once"])
def test_every_interleaving_of_a_seed_gives_each_message_its_outcome(exactly_once):
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        try:
            run(seed, exactly_once=exactly_once)
        except BaseException as error:
            raise AssertionError(f"seed {seed} fails (SEED={seed} SEEDS=1 make simulate): {error}") from error


def commit_past_unfinished(monkeypatch) -> None:
    take_done = Ledger.take_done

    def finished_out_of_order(self, *args, **kwargs):
        for entries in self._entries.values():
            if any(entry.finished for entry in entries):
                for entry in list(entries):
                    if not entry.finished:
                        entries.remove(entry)
                        del self._index[next(key for key, each in self._index.items() if each is entry)]
        return take_done(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "take_done", finished_out_of_order)


def accept_results_of_a_former_assignment(monkeypatch) -> None:
    def ignoring_the_epoch(self, record):
        return self._index.get((record.partition, record.offset))

    monkeypatch.setattr(Ledger, "_open", ignoring_the_epoch)
    monkeypatch.setattr(Ledger, "forget", lambda self, partitions: [])


def leave_outcomes_unbounded(monkeypatch) -> None:
    monkeypatch.setattr(Undelivered, "has_room", lambda self: True)


def drop_a_message_that_failed(monkeypatch) -> None:
    monkeypatch.setattr(AtLeastOnce, "_failed", lambda self, sending, error: self._sent(sending))


def forget_the_counts_of_starts(monkeypatch) -> None:
    def nothing_is_marked(self, record):
        marked: Future[None] = Future()
        marked.set_result(None)
        return marked

    monkeypatch.setattr(Partitions, "are_suspect", lambda self: False)
    monkeypatch.setattr(Partitions, "mark_alone", nothing_is_marked)


@pytest.mark.parametrize(
    "plant",
    [
        commit_past_unfinished,
        accept_results_of_a_former_assignment,
        leave_outcomes_unbounded,
        drop_a_message_that_failed,
        forget_the_counts_of_starts,
    ],
)
def test_a_planted_fault_is_found_by_a_seed(plant, monkeypatch):
    plant(monkeypatch)

    for seed in range(PLANTED_SEEDS):
        try:
            run(seed, exactly_once=False)
        except Exception as error:
            print(f"{plant.__name__}: found by seed {seed}: {error}")
            return
    pytest.fail(f"no seed below {PLANTED_SEEDS} finds the fault")

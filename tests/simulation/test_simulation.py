"""Whatever a seed lets happen, every message gets its one outcome and nothing waits for ever.

One kind of world runs a scripted job, the other the real ingest and rerank jobs. `make simulate SEEDS=100000` tries
more seeds. A failure names its seed, which SEED=… SEEDS=1 repeats, and writes it to build/simulation/.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import simulated_worker
from simulated_service import ServiceWorld
from workers.at_least_once import AtLeastOnce
from workers.delivery import Undelivered
from workers.ledger import Ledger
from workers.partitions import Partitions
from workers.rerank.fairness import FairQueue
from workers.rerank.loading import SlabLoader

FIRST_SEED = int(os.environ.get("SEED", "0"))
#: The kinds of worlds, and the seeds that are tried by default: about 12 s of CPU time each.
WORLDS: dict[str, tuple[Callable[..., Any], int]] = {
    "scripted": (simulated_worker.World, 400),
    "service": (ServiceWorld, 60),
}
#: Seeds within which a planted fault has to be found.
PLANTED_SEEDS = 300
FAILED_SEEDS = Path(__file__).parents[2] / "build" / "simulation" / "failed-seeds.txt"

pytestmark = pytest.mark.timeout(36_000)


class Silent:
    """A log that writes nothing: thousands of outages are simulated."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def _silent(monkeypatch):
    modules = ("loop", "delivery", "errors", "partitions", "exactly_once")
    jobs = ("rerank.loading", "rerank.invalidation", "rerank.replies", "ingest.outcomes", "ingest.fetching")
    for module in (*modules, *jobs):
        monkeypatch.setattr(f"workers.{module}.log", Silent())


def run(kind: str, seed: int, *, exactly_once: bool) -> None:
    world = WORLDS[kind][0](seed, exactly_once=exactly_once)
    world.run()
    world.verify()


@pytest.mark.parametrize("exactly_once", [False, True], ids=["at_least_once", "exactly_once"])
@pytest.mark.parametrize("kind", WORLDS)
def test_every_interleaving_of_a_seed_gives_each_message_its_outcome(kind, exactly_once):
    num_seeds = int(os.environ.get("SEEDS", WORLDS[kind][1]))
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        try:
            run(kind, seed, exactly_once=exactly_once)
        except BaseException as error:
            delivery = "exactly_once" if exactly_once else "at_least_once"
            sentence = f"{kind} world, {delivery}: seed {seed} fails (SEED={seed} SEEDS=1 make simulate): {error!r}"
            FAILED_SEEDS.parent.mkdir(parents=True, exist_ok=True)
            with FAILED_SEEDS.open("a", encoding="utf-8") as file:
                file.write(sentence + "\n")
            raise AssertionError(sentence) from error


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


def keep_changed_images_in_the_slab(monkeypatch) -> None:
    monkeypatch.setattr(SlabLoader, "invalidate", lambda self, image: None)


def write_late_blobs_of_former_owners(monkeypatch) -> None:
    monkeypatch.setattr("workers.store.memory.may_replace", lambda new, stored: True)


def serve_the_highest_priority_only(monkeypatch) -> None:
    def strictly(self):
        return max((level for level in self._levels.values() if level.heap), key=lambda level: level.weight)

    monkeypatch.setattr(FairQueue, "_next", strictly)


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("scripted", commit_past_unfinished),
        ("scripted", accept_results_of_a_former_assignment),
        ("scripted", leave_outcomes_unbounded),
        ("scripted", drop_a_message_that_failed),
        ("scripted", forget_the_counts_of_starts),
        ("service", keep_changed_images_in_the_slab),
        ("service", write_late_blobs_of_former_owners),
        ("service", serve_the_highest_priority_only),
    ],
)
def test_a_planted_fault_is_found_by_a_seed(kind, plant, monkeypatch):
    plant(monkeypatch)

    for seed in range(PLANTED_SEEDS):
        try:
            run(kind, seed, exactly_once=False)
        except Exception as error:
            print(f"{plant.__name__}: found by seed {seed}: {error}")
            return
    pytest.fail(f"no seed below {PLANTED_SEEDS} finds the fault")

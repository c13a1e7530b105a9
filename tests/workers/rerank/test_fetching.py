"""Fetches of blobs: on other threads, repeated while the store is away."""

from __future__ import annotations

import threading
import time

import pytest
from prometheus_client import CollectorRegistry, Histogram

from workers.errors import Misconfigured, Transient
from workers.rerank.fetching import BlobFetcher
from workers.retrying import Retry, Stopped
from workers.store.memory import MemoryStore

GIVE_UP_S = 20.0


class Store(MemoryStore):
    """Raises these errors first; `asked` is set by the first call."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)
        self.asked = threading.Event()
        self.threads: set[str] = set()

    def get_many(self, keys):
        self.threads.add(threading.current_thread().name)
        self.asked.set()
        if self.errors:
            raise self.errors.pop(0)
        return super().get_many(keys)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def seconds(registry):
    return Histogram("read_seconds", "Of reads.", registry=registry)


@pytest.fixture
def start(seconds, monkeypatch):
    """Make fetches over a store; closed at the end."""
    monkeypatch.setattr("workers.retrying.BASE_PAUSE_S", 0.0)
    made = []

    def over(store):
        fetches = BlobFetcher(store, Retry(), 2, seconds, time.monotonic)
        made.append(fetches)
        return fetches

    yield over
    for fetches in made:
        fetches.close()


def test_blobs_come_in_the_order_of_their_keys_with_none_for_what_is_not_there(start):
    store = Store()
    store.put_many({"a": b"1", "b": b"2"})

    assert start(store).start(["b", "none", "a"]).result(GIVE_UP_S).blobs == [b"2", None, b"1"]
    assert threading.current_thread().name not in store.threads


def test_a_store_that_is_away_is_asked_again_until_it_answers(start, registry):
    store = Store(Transient("away"), Transient("still away"))
    store.put_many({"a": b"1"})

    read = start(store).start(["a"]).result(GIVE_UP_S)

    assert (read.blobs, read.num_attempts) == ([b"1"], 3)
    assert store.errors == []
    assert registry.get_sample_value("read_seconds_count") == 1  # reads that were not answered are not timed


@pytest.mark.parametrize("error", [Misconfigured("wrong password"), ValueError("a bug")])
def test_an_error_that_waiting_does_not_mend_is_the_outcome(start, error):
    with pytest.raises(type(error)):
        start(Store(error)).start(["a"]).result(GIVE_UP_S)


def test_closing_gives_up_what_is_being_tried_and_what_waits(start):
    store = Store()
    store.away = True
    fetches = start(store)
    futures = [fetches.start(["a"]) for _ in range(8)]
    assert store.asked.wait(GIVE_UP_S)

    fetches.close()

    assert all(future.done() for future in futures)
    assert isinstance(futures[0].exception(), Stopped)

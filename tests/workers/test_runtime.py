"""Identities, signals and what the line `ready` names."""

from __future__ import annotations

import signal

import pytest

from workers.connect import transactional_id
from workers.health import Health
from workers.loop import Wake
from workers.runtime import _Signals


def test_two_workers_on_one_host_have_different_transactional_ids_and_a_restarted_one_has_the_same():
    assert transactional_id("g", 8080) == transactional_id("g", 8080)
    assert transactional_id("g", 8080) != transactional_id("g", 8081)


class StoppedLoop:
    def __init__(self) -> None:
        self.is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield _Signals(Health(waits_for=[], stall_limit_s=1.0))
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_ends_a_worker_that_is_starting(signals):
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)

    assert ended.value.code == 0


def test_a_signal_stops_the_loop_though_the_interrupted_thread_holds_every_lock(signals):
    loop = signals.loop = StoppedLoop()
    wake = Wake()

    with signals._health._lock, wake._event._cond:
        signal.raise_signal(signal.SIGTERM)

    assert loop.is_stopped
    assert signals._health.unready_reasons() == ["draining"]

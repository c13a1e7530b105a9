"""Trying again: only what is transient, until it succeeds, and not after the end."""

from __future__ import annotations

import pytest
from tenacity import stop_after_attempt

import workers.retrying
from workers.errors import Misconfigured, Transient
from workers.retrying import Retry, Stopped


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(workers.retrying, "MAX_PAUSE_S", 0.0)


def failing(*errors: Exception):
    """Raises these, then returns "done"."""
    remaining = list(errors)

    def call() -> str:
        if remaining:
            raise remaining.pop(0)
        return "done"

    return call


def test_a_transient_error_is_tried_again_and_each_retry_is_noted():
    noted = []
    retry = Retry(on_retry=lambda: noted.append(1))

    assert retry("fetch", failing(Transient("away"), Transient("still away"))) == "done"
    assert len(noted) == 2


def test_any_other_error_passes_at_once():
    noted = []

    with pytest.raises(Misconfigured, match="wrong password"):
        Retry(on_retry=lambda: noted.append(1))("fetch", failing(Misconfigured("wrong password")))
    assert noted == []


def test_a_bounded_call_ends_with_its_own_error():
    with pytest.raises(Transient, match="second"):
        Retry()("fetch", failing(Transient("first"), Transient("second")), stop=stop_after_attempt(2))


def test_after_the_stop_nothing_is_tried_again():
    retry = Retry()
    retry.stop()

    assert retry("fetch", failing()) == "done"
    with pytest.raises(Stopped):
        retry("fetch", failing(Transient("away")))


def test_a_stop_ends_a_call_that_is_being_tried():
    retry = Retry(on_retry=lambda: retry.stop())

    with pytest.raises(Stopped):
        retry("fetch", failing(Transient("away"), Transient("still away")))

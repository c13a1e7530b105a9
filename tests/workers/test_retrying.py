"""Trying again: only what is transient, until it succeeds, and not after the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import stop_after_attempt, wait_none

import workers.retrying
from workers.errors import Misconfigured, Transient
from workers.retrying import LOOP_MAX_PAUSE_S, Retry, Stopped, is_worth_a_line, pause_s


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(workers.retrying, "_WAIT", wait_none())


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


def test_errors_and_successes_are_reported():
    reported = []
    retry = Retry(on_error=lambda error: reported.append(str(error)), on_success=lambda: reported.append("restored"))

    retry("fetch", failing(Transient("away")))

    assert reported == ["away", "restored"]


@given(st.integers(1, 1000))
def test_the_pause_before_a_retry_has_a_ceiling(attempt):
    assert 0 <= pause_s(attempt) <= LOOP_MAX_PAUSE_S


def test_an_outage_is_logged_ever_more_rarely():
    assert [attempt for attempt in range(1, 40) if is_worth_a_line(attempt)] == [1, 2, 4, 8, 16, 32]

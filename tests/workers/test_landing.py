"""Results of other threads reach the loop's thread, in the order in which they arrive."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from workers.landing import Landing


@pytest.fixture
def woken():
    return threading.Event()


@pytest.fixture
def landing(woken):
    return Landing(woken.set)


def test_a_result_reaches_the_thread_that_turns(landing, woken):
    threads, results = [], []

    def then(result: int) -> None:
        results.append(result)
        threads.append(threading.current_thread())

    with ThreadPoolExecutor(1) as executor:
        landing.start(executor, lambda: 7, then)
        assert woken.wait(10)
        assert (results, landing.num_pending) == ([], 1)
        landing.turn()

    assert (results, threads, landing.num_pending) == ([7], [threading.current_thread()], 0)


def test_results_arrive_in_the_order_in_which_their_tasks_end(landing):
    first, second = Future(), Future()
    results = []
    landing.watch(first, results.append)
    landing.watch(second, results.append)

    second.set_result("second")
    first.set_result("first")
    landing.turn()

    assert results == ["second", "first"]


def test_an_exception_goes_to_the_callback_for_it(landing):
    future, errors = Future(), []
    landing.watch(future, lambda result: None, errors.append)

    future.set_exception(ZeroDivisionError("one"))
    landing.turn()

    assert [str(error) for error in errors] == ["one"]


def test_an_exception_without_a_callback_is_raised_where_the_result_would_arrive(landing):
    future = Future()
    landing.watch(future, lambda result: None)
    future.set_exception(ZeroDivisionError("one"))

    with pytest.raises(ZeroDivisionError, match="one"):
        landing.turn()

    assert landing.num_pending == 0


def test_a_cancelled_task_calls_nothing(landing):
    future, results = Future(), []
    landing.watch(future, results.append, results.append)

    future.cancel()
    future.set_running_or_notify_cancel()
    landing.turn()

    assert (results, landing.num_pending) == ([], 0)

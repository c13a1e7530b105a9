"""Limits: a gateway that has too much says so, and when to come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.gateway.errors import ApiError
from workers.gateway.limits import PairBudget, RateLimit


def refused(take) -> ApiError:
    with pytest.raises(ApiError) as caught:
        take()
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    return caught.value


def test_pairs_beyond_the_limit_are_refused_until_others_are_finished():
    budget = PairBudget(100)
    budget.take(60)
    budget.take(40)

    refused(lambda: budget.take(1))
    budget.give_back(40, now=1.0)

    budget.take(40)
    assert budget.num_pairs == 100


def test_a_request_larger_than_the_limit_is_taken_when_it_is_alone():
    budget = PairBudget(100)

    budget.take(1000)

    refused(lambda: budget.take(1))


def test_the_wait_follows_from_the_rate_at_which_pairs_are_finished():
    budget = PairBudget(1000)
    budget.take(1000)
    for second in range(60):
        budget.take(0)
        budget.num_pairs += 10
        budget.give_back(10, now=float(second))

    assert 8 <= int(refused(lambda: budget.take(100)).headers["Retry-After"]) <= 12


def test_the_wait_is_bounded():
    budget = PairBudget(10)
    budget.take(10)
    budget.num_pairs += 2
    budget.give_back(1, now=0.0)
    budget.give_back(1, now=1000.0)

    assert refused(lambda: budget.take(10)).headers["Retry-After"] == "30"


def test_a_caller_has_its_rate_and_a_burst():
    limit = RateLimit(10.0, burst_s=2.0)
    for _ in range(20):
        limit.take("a", 0.0)

    refused(lambda: limit.take("a", 0.0))
    limit.take("b", 0.0)
    limit.take("a", 0.1)
    refused(lambda: limit.take("a", 0.1))


def test_without_a_rate_nothing_is_refused():
    limit = RateLimit(None)

    for _ in range(1000):
        limit.take("a", 0.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=200))
def test_no_caller_exceeds_its_rate_in_the_long_run(steps):
    limit, now, taken = RateLimit(5.0, burst_s=1.0), 0.0, 0
    for wait, _ in steps:
        now += wait
        try:
            limit.take("a", now)
            taken += 1
        except ApiError:
            pass

    assert taken <= 5 + 5.0 * now + 1e-6

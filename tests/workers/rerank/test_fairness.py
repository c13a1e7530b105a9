"""The order of pieces: a weighted share for each priority, a fair share for each request of a priority."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.rerank.fairness import SMALLEST_SHARE, FairQueue

REQUESTS = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 9), st.integers(1, 50)), min_size=1, max_size=8
)  # number of pieces, priority, cost of each


def push_request(queue: FairQueue[str], name: str, num_pairs: int, *, priority: int = 0, piece: int = 64) -> None:
    costs = [float(min(piece, num_pairs - start)) for start in range(0, num_pairs, piece)]
    queue.push([name] * len(costs), costs, priority=priority)


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_a_small_request_is_not_behind_a_large_one_that_came_first():
    queue: FairQueue[str] = FairQueue()
    push_request(queue, "large", 1000)
    push_request(queue, "small", 10)

    assert drained(queue).index("small") == 1


def test_a_small_request_that_comes_in_the_middle_goes_next():
    queue: FairQueue[str] = FairQueue()
    push_request(queue, "large", 1000)
    for _ in range(5):
        queue.pop()

    push_request(queue, "small", 10)

    assert drained(queue).index("small") <= 1


def test_two_large_requests_take_turns():
    queue: FairQueue[str] = FairQueue()
    push_request(queue, "a", 512)
    push_request(queue, "b", 512)

    assert drained(queue) == ["a", "b"] * 8


def test_a_higher_priority_goes_first():
    queue: FairQueue[str] = FairQueue()
    push_request(queue, "small", 10)
    push_request(queue, "urgent", 64, priority=3)

    assert drained(queue) == ["urgent", "small"]


@pytest.mark.parametrize("priority", [1, 3, 9])
def test_while_both_wait_a_priority_gets_service_in_proportion_to_one_more_than_its_number(priority):
    queue: FairQueue[str] = FairQueue()
    push_request(queue, "low", 64 * 1000)
    push_request(queue, "high", 64 * 1000, priority=priority)

    served = [queue.pop() for _ in range(110)]

    assert served.count("high") == pytest.approx(110 * (1 + priority) / (2 + priority), abs=2)


def test_a_request_of_high_priority_goes_next_however_long_the_others_have_waited():
    queue: FairQueue[str] = FairQueue()
    for number in range(500):
        push_request(queue, f"low {number}", 64)
    for _ in range(100):
        queue.pop()

    push_request(queue, "urgent", 64, priority=9)

    assert [queue.pop(), queue.pop()].count("urgent") == 1


def test_a_priority_that_was_idle_has_saved_up_no_service():
    queue: FairQueue[str] = FairQueue()
    push_request(queue, "low", 64 * 300)
    for _ in range(200):
        queue.pop()
    push_request(queue, "high", 64 * 300, priority=1)

    served = [queue.pop() for _ in range(30)]

    assert served.count("low") == pytest.approx(10, abs=1)


def test_requests_of_one_piece_go_in_order_of_arrival():
    queue: FairQueue[int] = FairQueue()
    for number in range(20):
        queue.push([number], [100.0 - number], priority=0)

    assert [queue.peek()] + [queue.pop() for _ in range(20)] == [0, *range(20)]


def test_an_empty_queue_has_nothing_next():
    queue: FairQueue[str] = FairQueue()
    queue.push([], [], priority=0)

    with pytest.raises(IndexError):
        queue.peek()
    with pytest.raises(IndexError):
        queue.pop()


@given(REQUESTS)
def test_every_piece_leaves_once_and_in_its_own_requests_order(requests):
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for request, (num_pieces, priority, cost) in enumerate(requests):
        pieces = [(request, number) for number in range(num_pieces)]
        queue.push(pieces, [float(cost)] * num_pieces, priority=priority)

    left = drained(queue)

    assert sorted(left) == [(r, number) for r, (pieces, _, _) in enumerate(requests) for number in range(pieces)]
    assert all([p for r, p in left if r == each] == list(range(requests[each][0])) for each in range(len(requests)))


@given(REQUESTS, st.lists(st.booleans(), max_size=40))
def test_removed_pieces_leave_the_order_of_the_others_unchanged(requests, keeps):
    def filled() -> FairQueue[tuple[int, int]]:
        queue: FairQueue[tuple[int, int]] = FairQueue()
        for request, (num_pieces, _, cost) in enumerate(requests):
            queue.push([(request, n) for n in range(num_pieces)], [float(cost)] * num_pieces, priority=0)
        return queue

    unwanted = {request for request, keep in enumerate(keeps) if not keep}
    queue = filled()
    queue.discard(lambda piece: piece[0] in unwanted)

    assert sorted(drained(queue)) == sorted(piece for piece in drained(filled()) if piece[0] not in unwanted)
    assert len(queue) == 0


#: Priority, cost of each piece, number of pieces.
SMALL_REQUESTS = st.tuples(st.sampled_from([0, 1, 9]), st.integers(1, 4), st.integers(1, 4))
#: A worker accepts requests while the cost of those that wait is below its bound.
MAX_WAITING = 40


@settings(max_examples=60, deadline=None)
@given(
    waiting=SMALL_REQUESTS,
    before=st.lists(SMALL_REQUESTS, max_size=3),
    arrivals=st.lists(SMALL_REQUESTS, min_size=1, max_size=5),
)
def test_whatever_keeps_coming_a_waiting_request_is_served_within_a_bound(waiting, before, arrivals):
    queue: FairQueue[tuple[str, int]] = FairQueue()

    def push(name: str, request: tuple[int, int, int]) -> int:
        priority, cost, num_pieces = request
        queue.push([(name, cost)] * num_pieces, [float(cost)] * num_pieces, priority=priority)
        return cost * num_pieces

    num_waiting = sum(push("other", request) for request in before) + push("mine", waiting)

    # Later requests of the same priority take at most 32 times its own service, then what waits is before it; the
    # other priorities take their shares of all that.
    priority, cost, num_left = waiting
    within_priority = num_left * cost / SMALLEST_SHARE + MAX_WAITING + 16
    bound = within_priority * (1 + 2 + 10) / (1 + priority)
    served, turn = 0, 0
    while num_left:
        while num_waiting < MAX_WAITING:
            num_waiting += push("other", arrivals[turn % len(arrivals)])
            turn += 1
        name, cost = queue.pop()
        num_left -= name == "mine"
        num_waiting -= cost
        served += cost
        assert served <= bound

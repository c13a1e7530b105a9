"""The order of pieces: priority, then a fair share for every request, then order of arrival."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.rerank.fairness import FairQueue

FLOWS = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 2), st.integers(1, 50)), min_size=1, max_size=8
)  # number of pieces, priority, cost of each


def push_request(queue: FairQueue[str], name: str, num_pairs: int, *, priority: int = 0, piece: int = 64) -> None:
    for start in range(0, num_pairs, piece):
        queue.push(name, flow=name, cost=min(piece, num_pairs - start), priority=priority)
    queue.end_flow(name)


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


def test_a_higher_priority_goes_first_whatever_it_costs():
    queue: FairQueue[str] = FairQueue()
    push_request(queue, "small", 10)
    push_request(queue, "urgent", 1000, priority=3)

    assert drained(queue) == ["urgent"] * 16 + ["small"]


def test_requests_of_one_piece_go_in_order_of_arrival():
    queue: FairQueue[int] = FairQueue()
    for number in range(20):
        queue.push(number, flow=number, cost=100 - number, priority=0)

    assert [queue.peek()] + [queue.pop() for _ in range(20)] == [0, *range(20)]


def test_an_empty_queue_has_nothing_next():
    queue: FairQueue[str] = FairQueue()

    with pytest.raises(IndexError):
        queue.peek()
    with pytest.raises(IndexError):
        queue.pop()


def test_nothing_is_remembered_of_requests_that_have_ended():
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        push_request(queue, f"request {number}", 200)
        drained(queue)

    assert not queue._flow_ends
    assert len(queue) == 0


@given(FLOWS)
def test_every_piece_leaves_once_and_in_its_own_requests_order(flows):
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for flow, (num_pieces, priority, cost) in enumerate(flows):
        for place in range(num_pieces):
            queue.push((flow, place), flow=flow, cost=cost, priority=priority)
        queue.end_flow(flow)

    left = drained(queue)

    assert sorted(left) == [(flow, place) for flow, (pieces, _, _) in enumerate(flows) for place in range(pieces)]
    assert all([p for f, p in left if f == flow] == list(range(flows[flow][0])) for flow in range(len(flows)))
    priorities = [flows[flow][1] for flow, _ in left]
    assert priorities == sorted(priorities, reverse=True)

"""When images are fetched and when a batch of them leaves, without a clock and without a network."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import Transient
from workers.ingest.scheduling import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    LONGEST_RETRY_AFTER_S,
    FetchQueue,
    ImageBatcher,
    Unavailable,
)

# --- fetches ---


def queue_of(max_fetches: int = 16, retry_for_s: float = 600.0) -> FetchQueue[str]:
    return FetchQueue(max_fetches=max_fetches, retry_for_s=retry_for_s, uniform=lambda low, high: high)


def take_all(queue: FetchQueue[str], now: float) -> list[str]:
    return list(iter(lambda: queue.take(now), None))


def test_a_new_host_has_a_quarter_of_the_fetches_and_others_have_the_rest():
    queue = queue_of(16)
    for number in range(20):
        queue.add(f"slow-{number}", "slow")
    assert take_all(queue, 0.0) == [f"slow-{number}" for number in range(4)]

    for number in range(3):
        queue.add(f"fast-{number}", "fast")

    assert take_all(queue, 0.0) == ["fast-0", "fast-1", "fast-2"]


def test_a_fast_host_gets_up_to_three_quarters():
    queue = queue_of(16)
    for number in range(100):
        queue.add(f"{number}", "fast")
    under_way = take_all(queue, 0.0)
    for _ in range(20):
        queue.succeeded(under_way.pop(0), 0.1)
        under_way += take_all(queue, 0.1)

    assert len(under_way) == queue.num_fetching == 12


def test_a_host_that_answers_slowly_gets_no_more():
    queue = queue_of(16)
    for number in range(40):
        queue.add(f"{number}", "slow")
    under_way = take_all(queue, 0.0)
    for second in range(1, 10):
        queue.succeeded(under_way.pop(0), 10.0 * second)
        under_way += take_all(queue, 10.0 * second)

    assert len(under_way) == 4


def test_hosts_take_turns():
    queue = queue_of(4)
    for host in ("a", "b"):
        for number in range(3):
            queue.add(f"{host}{number}", host)

    first = [queue.take(0.0), queue.take(0.0)]

    assert first == ["a0", "b0"]


def test_pauses_grow_up_to_a_bound():
    queue = queue_of()
    queue.add("a", "host")
    now, pauses = 0.0, []
    while now < 300.0:
        assert queue.take(now) == "a"
        assert queue.failed("a", Transient("refused"), now)
        pause = queue.wants_turn_in_s(now)
        assert queue.take(now + pause - 0.001) is None
        pauses.append(pause)
        now += pause

    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert max(pauses) == LONGEST_PAUSE_S
    assert pauses == sorted(pauses)


def test_pauses_are_random():
    queue: FetchQueue[int] = FetchQueue(max_fetches=400, retry_for_s=600.0)
    for number in range(100):
        queue.add(number, "host")
    pauses = set()
    while (item := queue.take(0.0)) is not None:
        queue.failed(item, Transient("refused"), 0.0)
    now = 0.0
    while (wait := queue.wants_turn_in_s(now)) is not None and len(pauses) < 50:
        now += wait
        queue.take(now)
        pauses.add(now)

    assert min(pauses) >= FIRST_PAUSE_S / 2
    assert max(pauses) <= FIRST_PAUSE_S
    assert len(pauses) > 10


def test_an_image_is_given_up_when_its_time_is_over_after_a_last_attempt():
    queue = queue_of(retry_for_s=60.0)
    queue.add("a", "host")
    now, num_attempts = 5.0, 0
    while True:
        assert queue.take(now) == "a"
        num_attempts = queue.num_attempts("a")
        if not queue.failed("a", Transient("refused"), now):
            break
        now += queue.wants_turn_in_s(now)

    assert now == 65.0
    assert num_attempts == 8
    assert queue.num_waiting() == 0


def test_the_time_of_an_image_begins_with_its_first_attempt():
    queue = queue_of(max_fetches=1, retry_for_s=10.0)
    queue.add("first", "host")
    queue.add("second", "host")
    assert queue.take(0.0) == "first"
    queue.succeeded("first", 100.0)

    assert queue.take(100.0) == "second"
    assert queue.failed("second", Transient("refused"), 105.0)


def test_the_pause_that_a_host_asks_for_holds_for_all_its_images_and_for_no_other_host():
    queue = queue_of(16)
    for number in range(8):
        queue.add(f"busy-{number}", "busy")
    queue.add("other", "other")
    assert queue.take(0.0) == "busy-0"
    queue.failed("busy-0", Unavailable("429", retry_after_s=2.0), 0.0)

    assert take_all(queue, 0.1) == ["other"]
    assert take_all(queue, 1.99) == []
    assert len(take_all(queue, 2.0)) == 2


def test_a_pause_that_a_host_asks_for_is_bounded():
    queue = queue_of()
    queue.add("a", "host")
    queue.take(0.0)
    queue.failed("a", Unavailable("503", retry_after_s=1e9), 0.0)

    assert queue.wants_turn_in_s(0.0) == LONGEST_RETRY_AFTER_S
    assert queue.take(LONGEST_RETRY_AFTER_S) == "a"


def test_an_error_that_seldom_passes_is_given_up_sooner():
    queue = queue_of(retry_for_s=600.0)
    queue.add("a", "host")
    now = 0.0
    while queue.take(now) == "a" and queue.failed("a", Unavailable("no such name", give_up_after_s=30.0), now):
        now += queue.wants_turn_in_s(now)

    assert now == 30.0


def test_a_host_that_recovers_gets_its_fetches_back():
    queue = queue_of(16)
    for number in range(200):
        queue.add(f"{number}", "host")
    for item in take_all(queue, 0.0):
        queue.failed(item, Transient("refused"), 0.0)
    under_way = take_all(queue, 0.0)
    assert len(under_way) == 1

    for _ in range(30):
        queue.succeeded(under_way.pop(0), 1.0)
        under_way += take_all(queue, 1.0)

    assert len(under_way) == 12


def test_waiting_items_can_be_removed_and_those_under_way_stay():
    queue = queue_of(4)
    for number in range(4):
        queue.add(f"{number}", "host")
    assert queue.take(0.0) == "0"
    queue.failed("0", Transient("refused"), 0.0)
    assert queue.take(0.0) == "1"

    removed = queue.remove(lambda item: item in "0123")

    assert sorted(removed) == ["0", "2", "3"]
    assert (queue.num_waiting(), queue.num_fetching) == (0, 1)
    assert queue.take(100.0) is None
    queue.succeeded("1", 100.0)
    assert queue.num_fetching == 0


def test_many_hosts_are_forgotten_again():
    queue = queue_of()
    for number in range(5_000):
        queue.add(f"{number}", f"host-{number}")
        assert queue.take(0.0) == f"{number}"
        queue.succeeded(f"{number}", 0.0)

    assert len(queue._hosts) <= 2_000


@settings(max_examples=100)
@given(st.data())
def test_every_item_is_fetched_within_the_bounds_until_it_succeeds_or_its_time_is_over(data):
    max_fetches, retry_for_s = data.draw(st.integers(1, 9)), data.draw(st.floats(0.1, 20.0))
    queue: FetchQueue[int] = FetchQueue(max_fetches=max_fetches, retry_for_s=retry_for_s)
    host_of = {number: data.draw(st.sampled_from("abc")) for number in range(data.draw(st.integers(0, 25)))}
    for number, host in host_of.items():
        queue.add(number, host)
    now, under_way, ended, attempts = 0.0, [], Counter(), Counter()
    for _ in range(3_000):
        while (item := queue.take(now)) is not None:
            under_way.append(item)
            attempts[item] += 1
            assert queue.num_attempts(item) == attempts[item]
        assert len(under_way) == queue.num_fetching <= max_fetches
        if under_way:
            item = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            now += data.draw(st.floats(0, 3))
            match data.draw(st.integers(0, 3)):
                case 0:
                    queue.succeeded(item, now)
                    ended[item] += 1
                case 1:
                    queue.abandon(item)
                    ended[item] += 1
                case outcome:
                    error = Unavailable("429", retry_after_s=1.0) if outcome == 2 else Transient("reset")
                    ended[item] += not queue.failed(item, error, now)
        elif (wait := queue.wants_turn_in_s(now)) is not None:
            now += wait
        else:
            break

    assert ended == Counter(host_of.keys())
    assert (queue.num_waiting(), queue.num_fetching) == (0, 0)


def test_an_item_that_is_not_under_way_cannot_end():
    queue = queue_of()

    with pytest.raises(KeyError):
        queue.succeeded("a", 0.0)


# --- batches ---


def test_a_full_batch_leaves_at_once():
    batcher = ImageBatcher[int](max_images=2, max_wait_s=1.0)
    for image in range(5):
        batcher.add(image, now=10.0)

    assert batcher.take(10.0, more_is_coming=True) == [0, 1]
    assert batcher.take(10.0, more_is_coming=True) == [2, 3]
    assert batcher.take(10.0, more_is_coming=True) == []


def test_a_lone_image_leaves_when_it_has_waited_long_enough():
    batcher = ImageBatcher[str](max_images=8, max_wait_s=0.005)
    batcher.add("image", now=10.0)

    assert batcher.take(10.004, more_is_coming=True) == []
    assert batcher.take(10.005, more_is_coming=True) == ["image"]


def test_a_lone_image_leaves_at_once_when_nothing_could_join_it():
    batcher = ImageBatcher[str](max_images=8, max_wait_s=5.0)
    batcher.add("image", now=10.0)

    assert batcher.take(10.0, more_is_coming=False) == ["image"]
    assert batcher.take(10.0, more_is_coming=False) == []


def test_the_wait_is_known_in_advance():
    batcher = ImageBatcher[str](max_images=8, max_wait_s=0.5)
    assert batcher.wants_turn_in_s(10.0) is None

    batcher.add("image", now=10.0)

    assert batcher.wants_turn_in_s(10.2) == 0.5 + 10.0 - 10.2
    assert batcher.wants_turn_in_s(11.0) == 0.0


@given(
    steps=st.lists(st.tuples(st.booleans(), st.floats(0, 2), st.booleans())),
    max_images=st.integers(1, 5),
    max_wait_s=st.floats(0, 3),
)
def test_every_image_leaves_once_in_order_and_in_time(steps, max_images, max_wait_s):
    batcher = ImageBatcher[int](max_images=max_images, max_wait_s=max_wait_s)
    now, added, left = 0.0, [], []
    for adds, pause, more_is_coming in steps:
        now += pause
        if adds:
            batcher.add(len(added), now)
            added.append(now)
        while batch := batcher.take(now, more_is_coming=more_is_coming):
            assert len(batch) <= max_images
            left += batch
        wait = batcher.wants_turn_in_s(now)
        assert (wait is None) == (len(left) == len(added))
        assert wait is None or (more_is_coming and 0.0 < wait <= max_wait_s + 1e-9)
        assert len(added) - len(left) < max_images or not more_is_coming
    while batch := batcher.take(now, more_is_coming=False):
        left += batch

    assert left == list(range(len(added)))

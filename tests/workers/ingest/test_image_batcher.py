"""When a batch of images leaves, without a clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.ingest.image_batcher import ImageBatcher


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


def test_the_wait_is_told_in_advance():
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
def test_every_image_leaves_once_and_in_order_and_none_overstays(steps, max_images, max_wait_s):
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

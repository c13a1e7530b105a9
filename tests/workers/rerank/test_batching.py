"""Micro-batches: every piece leaves once and in time, budgets are kept, and lengths are not mixed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt.text_lengths import LENGTH_STEP, padded_length
from workers.rerank.batching import MicroBatcher


@dataclass(frozen=True)
class Pairs:
    num_pairs: int = 10
    tokens_per_pair: int = 80
    name: int = 0
    bucket: int = 16


def batcher(*, max_tokens: int = 8000, max_pairs: int = 64, max_wait_s: float = 0.005) -> MicroBatcher[Pairs]:
    return MicroBatcher(max_tokens=max_tokens, max_pairs=max_pairs, max_wait_s=max_wait_s)


def test_a_lone_piece_leaves_when_it_has_waited_long_enough():
    waiting = batcher()
    waiting.add(Pairs(), 1, now=10.0)

    assert waiting.take(10.004, more_is_coming=True) == []
    assert waiting.wants_turn_in_s(10.004) == pytest.approx(0.001)
    assert waiting.take(10.006, more_is_coming=True) == [Pairs()]
    assert waiting.wants_turn_in_s(10.006) is None


def test_a_lone_piece_leaves_at_once_when_nothing_could_join_it():
    waiting = batcher()
    waiting.add(Pairs(), 1, now=10.0)

    assert waiting.take(10.0, more_is_coming=False) == [Pairs()]


@pytest.mark.parametrize("budget", [{"max_pairs": 20}, {"max_tokens": 1600}])
def test_a_full_bucket_leaves_at_once(budget):
    waiting = batcher(**budget)
    for number in range(3):
        waiting.add(Pairs(name=number), number, now=10.0)

    assert [piece.name for piece in waiting.take(10.0, more_is_coming=True)] == [0, 1]
    assert waiting.take(10.0, more_is_coming=True) == []
    assert waiting.num_pairs == 10


def test_pieces_of_different_buckets_do_not_share_a_batch():
    waiting = batcher()
    waiting.add(Pairs(name=1), 1, now=10.0)
    waiting.add(Pairs(name=2, bucket=24), 2, now=10.0)

    assert [piece.name for piece in waiting.take(10.0, more_is_coming=False)] == [1]
    assert [piece.name for piece in waiting.take(10.0, more_is_coming=False)] == [2]


def test_the_bucket_with_the_first_rank_leaves_first_and_is_filled_in_rank_order():
    waiting = batcher()
    waiting.add(Pairs(name=3), 3, now=10.0)
    waiting.add(Pairs(name=2, bucket=24), 2, now=10.0)
    waiting.add(Pairs(name=1, bucket=24), 1, now=10.0)

    assert [piece.name for piece in waiting.take(10.0, more_is_coming=False)] == [1, 2]


def test_a_piece_over_the_budget_leaves_alone():
    waiting = batcher(max_pairs=8)
    waiting.add(Pairs(name=1), 1, now=10.0)
    waiting.add(Pairs(name=2), 2, now=10.0)

    assert [piece.name for piece in waiting.take(10.0, more_is_coming=True)] == [1]


@pytest.mark.parametrize(("length", "bucket"), [(1, 8), (8, 8), (9, 16), (64, 64)])
def test_lengths_are_rounded_up_to_the_bucket(length, bucket):
    assert padded_length(length) == bucket
    assert bucket % LENGTH_STEP == 0


ADDED = st.lists(st.tuples(st.integers(1, 64), st.integers(2, 61), st.integers(0, 2), st.floats(0, 0.01)), max_size=60)


@given(ADDED, st.booleans())
def test_every_piece_leaves_exactly_once_within_the_budgets_and_in_time(added, more_is_coming):
    waiting = batcher(max_tokens=6000, max_pairs=64)
    now, left, since = 0.0, [], {}

    def take_all():
        while batch := waiting.take(now, more_is_coming=more_is_coming):
            num_pairs = sum(piece.num_pairs for piece in batch)
            assert len({padded_length(piece.tokens_per_pair - 64) for piece in batch}) == 1
            assert len(batch) == 1 or num_pairs <= 64
            assert len(batch) == 1 or sum(piece.num_pairs * piece.tokens_per_pair for piece in batch) <= 6000
            left.extend(piece.name for piece in batch)
        # What has waited long enough, and what cannot be joined, is gone.
        assert not [name for name, start in since.items() if now >= start + 0.005 and name not in left]
        assert more_is_coming or waiting.num_pairs == 0

    for name, (num_pairs, length, urgency, pause_s) in enumerate(added):
        now += pause_s
        rank = (2 - urgency) * len(added) + name
        waiting.add(Pairs(num_pairs, length + 64, name, padded_length(length)), rank, now)
        since[name] = now
        take_all()
    now += 0.005
    take_all()

    assert sorted(left) == list(range(len(added)))
    assert waiting.num_pairs == 0
    assert waiting.wants_turn_in_s(now) is None

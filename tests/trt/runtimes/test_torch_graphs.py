"""Scoring by graphs in torch: the logits are those without them, whatever is filled up, and what comes back is kept."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_recorder import done_again
from trt.runtimes.torch_graphs import GraphedScoring, Size, pair_buckets

MAX_PAIRS, MAX_TEXT, DIM = 40, 6, 2
CPU = torch.device("cpu")
generator = torch.Generator().manual_seed(0)
SLAB = torch.rand(30, generator=generator)
STATES = torch.rand(5, MAX_TEXT, DIM, generator=generator)


def score(texts, slots, scores):
    """Depends on all that a pair has."""
    logits = texts.sum((1, 2)) + SLAB[slots]
    return logits if scores is None else logits + scores


def graphed(record=done_again, record_at=2):
    return GraphedScoring(
        score,
        record,
        buckets=pair_buckets(MAX_PAIRS),
        max_text_tokens=MAX_TEXT,
        token_dim=DIM,
        device=CPU,
        record_at=record_at,
    )


groups = st.tuples(
    st.integers(1, MAX_TEXT),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 29)), min_size=1, max_size=MAX_PAIRS),
    st.booleans(),
)


@settings(deadline=None)  # the first product takes long
@given(st.lists(groups, min_size=1, max_size=12))
def test_every_group_gets_the_logits_of_its_own_pairs(given_groups):
    scoring = graphed()
    for text_tokens, pairs, has_scores in given_groups:
        rows, slots = (torch.tensor(column, dtype=torch.int32) for column in zip(*pairs, strict=True))
        scores = torch.arange(len(pairs), dtype=torch.float32) if has_scores else None
        states = STATES[:, :text_tokens]

        found = scoring(states, rows, slots, scores)

        torch.testing.assert_close(found, score(states[rows], slots, scores))


def ask(scoring, num_pairs, text_tokens=3):
    numbers = torch.zeros(num_pairs, dtype=torch.int32)
    return scoring(STATES[:, :text_tokens], numbers, numbers, None)


def test_a_size_is_recorded_when_it_comes_back():
    recorded = []

    def record(work):
        recorded.append(work)
        return done_again(work)

    scoring = graphed(record)
    ask(scoring, 17)
    assert recorded == []

    ask(scoring, 20)  # filled up to the same number of pairs
    ask(scoring, 24)

    assert (len(recorded), scoring.num_recorded) == (1, 1)
    ask(scoring, 25)
    ask(scoring, 17, text_tokens=4)
    assert len(recorded) == 1


def test_with_fixed_sizes_nothing_runs_without_being_recorded():
    scoring = graphed(record_at=1)
    ask(scoring, 5)
    assert scoring.num_recorded == 1


def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once(caplog):
    def refused(work):
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    scoring = graphed(refused)
    with caplog.at_level(logging.WARNING):
        found = [ask(scoring, 3) for _ in range(4)]

    assert scoring.num_recorded == 0
    torch.testing.assert_close(found[3], found[0])
    (told,) = caplog.messages
    assert str(Size(16, 3, False)) in told
    assert told.endswith("capturing")


@pytest.mark.parametrize("max_pairs", [1, 8, 16, 17, 48, 256, 1000, 1024])
def test_at_most_a_third_is_filling(max_pairs):
    buckets = pair_buckets(max_pairs)

    assert buckets.largest == max_pairs
    for num_pairs in range(16, max_pairs + 1):
        assert num_pairs <= buckets.smallest_for(num_pairs) < 1.5 * num_pairs

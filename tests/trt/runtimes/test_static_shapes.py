"""Division of calls into the few batch sizes of a plan."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt.graphs import PAIRS, QUERIES, TEXT_TOKENS
from trt.profiles import narrowest_profile, profiles_of
from trt.runtimes.static_shapes import Buckets, count_buckets, length_buckets, pair_pieces, text_blocks

PROFILES = profiles_of(max_text_tokens=63, length_buckets=(16, 32), max_pairs=256, max_queries=256, max_images=16)
LENGTHS = Buckets((16, 32, 63))


def ranges(graph, dimension):
    return [profile.ranges[dimension] for profile in PROFILES[graph]]


def test_sizes_are_the_ends_of_profiles_and_steps_within_them():
    assert length_buckets(ranges("pair", TEXT_TOKENS)).sizes == (16, 32, 63)
    assert count_buckets(ranges("pair", PAIRS), 256, steps=4, fixed=False).sizes == (
        4,
        8,
        12,
        16,
        32,
        48,
        64,
        128,
        192,
        256,
    )


def test_one_step_is_the_end_of_each_profile():
    assert count_buckets(ranges("query", QUERIES), 256, steps=1, fixed=False).sizes == (16, 64, 256)


def test_sizes_end_where_the_calls_do():
    assert count_buckets(ranges("pair", PAIRS), 40, steps=4, fixed=False).largest == 48
    assert count_buckets(ranges("pair", PAIRS), 1000, steps=4, fixed=False).largest == 256


def test_fixed_sizes_are_one_that_holds_every_call():
    assert count_buckets(ranges("pair", PAIRS), 40, steps=4, fixed=True).sizes == (48,)


@given(max_pairs=st.integers(1, 600), most=st.integers(1, 600), fixed=st.booleans())
def test_every_size_has_a_profile(max_pairs, most, fixed):
    profiles = profiles_of(
        max_text_tokens=63, length_buckets=(16, 32), max_pairs=max_pairs, max_queries=max_pairs, max_images=4
    )["pair"]
    pairs = count_buckets([each.ranges[PAIRS] for each in profiles], most, steps=4, fixed=fixed)
    queries = count_buckets([each.ranges[QUERIES] for each in profiles], most, steps=4, fixed=fixed)

    assert pairs.largest >= min(most, max_pairs)
    for size in pairs.sizes:
        narrowest_profile(profiles, {PAIRS: size, QUERIES: queries.largest, TEXT_TOKENS: 63})


@pytest.mark.parametrize(("size", "bucket"), [(1, 16), (16, 16), (17, 32), (63, 63)])
def test_the_smallest_bucket_that_holds_a_size_is_taken(size, bucket):
    assert LENGTHS.smallest_for(size) == bucket


@given(
    lengths=st.lists(st.integers(1, 63), min_size=1, max_size=30),
    pairs=st.lists(st.integers(0, 29), max_size=60),
    max_queries=st.integers(1, 9),
    max_pairs=st.integers(1, 20),
)
def test_every_text_and_every_pair_is_laid_out_once_within_the_limits(lengths, pairs, max_queries, max_pairs):
    lengths = np.array(lengths, np.int64)
    pair_query = np.array([pair % len(lengths) for pair in pairs], np.int32)

    blocks = text_blocks(lengths, LENGTHS, max_queries)
    pieces = list(pair_pieces(blocks, len(lengths), pair_query, max_pairs))

    assert sorted(text for block in blocks for text in block.texts) == list(range(len(lengths)))
    assert sorted(pair for piece in pieces for pair in piece.pairs) == list(range(len(pair_query)))
    for block in blocks:
        assert len(block.texts) <= max_queries
        assert {LENGTHS.smallest_for(length) for length in lengths[block.texts]} == {block.text_tokens}
    for piece in pieces:
        assert len(piece.pairs) <= max_pairs
        np.testing.assert_array_equal(blocks[piece.block].texts[piece.rows], pair_query[piece.pairs])


def test_no_texts_and_no_pairs_are_nothing_to_do():
    blocks = text_blocks(np.zeros(0, np.int64), LENGTHS, 4)

    assert blocks == []
    assert list(pair_pieces(blocks, 0, np.zeros(0, np.int32), 4)) == []

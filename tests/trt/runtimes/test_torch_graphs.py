"""Scoring with CUDA graphs: the same logits as without, and every size captured before the first call."""

import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_contract import CAT, DOG, LATE_FUSION, MAX_PAIRS, NUM_SLOTS, all_scores, fill_slots, numbers
from small_engines import torch_engine
from torch_recorder import RecordingTorch
from trt.contract import EngineBroken, GraphCounts
from trt.runtimes.static_shapes import halving_buckets
from trt.text_lengths import TEXT_LENGTHS

TEXTS = [DOG, CAT, [2, *range(30, 60), 3], [2, 3], [2, *range(30, 45), 3], [2] * 63]
#: Texts of every bucket of 63 tokens times numbers of texts and of pairs up to 48.
NUM_SIZES = 8 * (len(halving_buckets(1, MAX_PAIRS).sizes) + len(halving_buckets(16, MAX_PAIRS).sizes))


@pytest.fixture
def recording():
    return RecordingTorch()


@pytest.fixture
def graphed(checkpoint, recording):
    return torch_engine(checkpoint, "int8", staged=True, device=recording.device)


@pytest.fixture(scope="module", params=["tiny", *LATE_FUSION])
def both(request, checkpoints):
    """The same slots in an engine that scores directly and in one that replays."""
    checkpoint = checkpoints / request.param
    engines = [
        torch_engine(checkpoint, "int8"),
        torch_engine(checkpoint, "int8", staged=True, device=RecordingTorch().device),
    ]
    random = np.random.default_rng(0)
    info = engines[0].info
    for start in range(0, NUM_SLOTS, 12):
        tokens = random.normal(size=(12, info.num_visual_tokens, info.token_dim)).astype(np.float32)
        for engine in engines:
            fill_slots(engine, range(start, start + 12), tokens)
    return engines


pairs = st.lists(
    st.tuples(st.integers(0, len(TEXTS) - 1), st.integers(0, NUM_SLOTS - 1)), min_size=1, max_size=MAX_PAIRS
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=pairs)
def test_a_logit_does_not_depend_on_what_pads_its_batch(both, pairs):
    query, slot = (numbers(*column) for column in zip(*pairs, strict=True))

    direct, graphed = (each.score_pairs(each.encode_queries(TEXTS), query, slot) for each in both)

    np.testing.assert_allclose(graphed, direct, atol=1e-5)


def test_warming_up_records_every_size_and_a_call_records_none(graphed, recording, pixels):
    graphed.warm_up()
    assert graphed.graph_counts() == GraphCounts(NUM_SIZES, 0)

    fill_slots(graphed, range(12), graphed.encode_images(pixels)[0])
    all_scores(graphed, TEXTS[:4], 12)
    all_scores(graphed, [[2] * 63], 3)

    assert recording.num_recorded == NUM_SIZES
    assert recording.num_replayed > 0


def test_texts_of_one_bucket_are_encoded_and_scored_together(graphed, recording):
    graphed.warm_up()

    all_scores(graphed, [[2] * length for length in (17, 18, 19, 20, 21)], 5)

    assert recording.num_replayed == 2


def test_no_memory_for_a_graph_ends_the_process(graphed, recording):
    recording.fault = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(EngineBroken, match="no memory for the CUDA graph of 1 texts of 8 text tokens: ask for fewer"):
        graphed.warm_up()


def test_work_that_cannot_be_recorded_is_run_and_counted(graphed, recording, checkpoint, pixels, caplog):
    recording.fault = RuntimeError("operation not permitted when stream is capturing\nmore")
    direct = torch_engine(checkpoint, "int8")
    for engine in (graphed, direct):
        fill_slots(engine, range(12), direct.encode_images(pixels)[0])

    with caplog.at_level(logging.WARNING):
        found = all_scores(graphed, [DOG], 12)

    np.testing.assert_allclose(found, all_scores(direct, [DOG], 12), atol=1e-5)
    assert graphed.graph_counts() == GraphCounts(0, 2)
    assert "16 pairs of 8 text tokens run without a CUDA graph: operation not permitted" in caplog.text


def test_with_fixed_sizes_a_logit_is_the_same_in_every_batch(checkpoint, recording, pixels):
    engine = torch_engine(checkpoint, "int8", staged=True, device=recording.device, fixed_buckets=True)
    fill_slots(engine, range(12), engine.encode_images(pixels)[0])
    engine.warm_up()
    together = all_scores(engine, [DOG, CAT], 12)[0]
    queries = engine.encode_queries([DOG])

    alone = [engine.score_pairs(queries, numbers(0), numbers(slot))[0] for slot in range(12)]

    assert engine.graph_counts() == GraphCounts(2 * len(TEXT_LENGTHS), 0)
    np.testing.assert_allclose(together, alone, atol=1e-6)  # a processor's kernels depend on a row's index


def test_copies_are_timed_by_events_of_the_engines_device(graphed, pixels):
    fill_slots(graphed, range(3), graphed.encode_images(pixels[:3])[0])
    all_scores(graphed, [DOG], 3)

    copies = graphed.last_copies()

    assert (copies.to_device_s, copies.to_host_s) == pytest.approx((0.25e-3, 0.25e-3))


def test_a_processor_has_no_graphs_and_no_copies(checkpoint):
    engine = torch_engine(checkpoint, "int8")

    assert engine.graph_counts() is None
    assert engine.last_copies() is None


@given(st.integers(1, 40), st.integers(1, 2_000))
def test_sizes_end_at_the_largest_and_at_most_a_third_is_padding(smallest, largest):
    sizes = halving_buckets(smallest, largest).sizes

    assert sizes[-1] == largest
    assert sorted(set(sizes)) == list(sizes)
    for below, above in itertools.pairwise(sizes):
        assert (above - below - 1) / above <= 1 / 3

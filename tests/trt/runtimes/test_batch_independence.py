"""In fixed shapes a pair's logit is the same to the last bit in any company; otherwise it moves by rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.init import write_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint
from protocols.quantize import quantize
from trt.runtimes.grouping import fixed_groups
from trt.runtimes.torch_engine import TorchEngine
from trt.slab.host import SharedSlab
from trt.slab.layout import SlotLayout

NUM_SLOTS, MAX_PAIRS = 12, 64
TEXTS = [[2, *range(10, 14), 3], [2, *range(20, 24), 3], [2, *range(30, 45), 3], [2, 3]]


@pytest.fixture(scope="module", params=["tiny", "tiny-late", "tiny-minimal", "tiny-maxsim"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("independence") / request.param
    write_untrained(VARIANTS[request.param], path, seed=1)
    return path


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def engine(request, checkpoint):
    loaded = load_checkpoint(checkpoint)
    layout = SlotLayout("int8", loaded.config.adapter.num_tokens, loaded.config.joint.dim)
    made = TorchEngine(
        loaded,
        slab=SharedSlab(layout, NUM_SLOTS),
        max_pairs=MAX_PAIRS,
        max_images=1,
        device=torch.device("cpu"),
        dtype=request.param,
        fixed_buckets=True,
    )
    images = np.random.default_rng(0).normal(size=(NUM_SLOTS, layout.num_tokens, layout.token_dim))
    tokens, scales, rows = made.slab.stage(range(NUM_SLOTS))
    for row, image in zip(rows, images.astype(np.float32), strict=True):
        values, steps = quantize("int8", image)
        tokens[row], scales[row] = np.frombuffer(values, np.uint8), np.frombuffer(steps, np.uint8)
    return made


@pytest.fixture(scope="module")
def alone(engine):
    """Every pair's logit when nothing else is in the call: (text, slot)."""
    logits = np.empty((len(TEXTS), NUM_SLOTS), np.float32)
    for row, text in enumerate(TEXTS):
        queries = engine.encode_queries([text])
        for slot in range(NUM_SLOTS):
            logits[row, slot] = engine.score_pairs(queries, np.zeros(1, np.int32), np.array([slot], np.int32))[0]
    return logits


pairs = st.lists(st.tuples(st.integers(0, len(TEXTS) - 1), st.integers(0, NUM_SLOTS - 1)), min_size=1, max_size=40)


@given(pairs=pairs, order=st.permutations(range(len(TEXTS))))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_fixed_shapes_no_company_moves_a_logit(engine, alone, pairs, order):
    """`order` is the one in which the texts come to be encoded together."""
    queries = engine.encode_queries([TEXTS[text] for text in order])
    place = {text: index for index, text in enumerate(order)}
    texts, slots = (np.array(column, np.int32) for column in zip(*pairs, strict=True))

    logits = engine.score_pairs(queries, np.array([place[text] for text in texts], np.int32), slots)

    np.testing.assert_array_equal(logits, alone[texts, slots])


def test_an_engine_with_fixed_shapes_says_so_in_its_digest(checkpoint, engine):
    loaded = load_checkpoint(checkpoint)
    free = TorchEngine(
        loaded, slab=engine.slab, max_pairs=MAX_PAIRS, max_images=1, device=torch.device("cpu"), dtype=engine._dtype
    )

    assert free.info.engine_digest != engine.info.engine_digest


@given(lengths=st.lists(st.integers(1, 5), max_size=60), num_pairs=st.integers(1, 9))
def test_fixed_groups_hold_each_pair_once_in_groups_of_one_size_and_one_length(lengths, num_pairs):
    found = np.array(lengths, np.int64)

    groups = list(fixed_groups(found, num_pairs))

    assert all(len(group) == num_pairs and len(set(found[group])) == 1 for group, _ in groups)
    assert sorted(pair for group, num_real in groups for pair in group[:num_real]) == list(range(len(lengths)))

"""With fixed sizes a pair's logit is the same to the last bit in every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_contract import LATE_FUSION, MAX_PAIRS, fill_slots, numbers
from small_engines import torch_engine

NUM_IMAGES = 12
TEXTS = [[2, *range(10, 14), 3], [2, *range(20, 24), 3], [2, *range(30, 45), 3], [2, 3]]


@pytest.fixture(scope="module", params=["tiny", *LATE_FUSION])
def variant(request):
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def engine(request, checkpoints, variant):
    made = torch_engine(checkpoints / variant, "int8", request.param, fixed_buckets=True)
    shape = (NUM_IMAGES, made.info.num_visual_tokens, made.info.token_dim)
    fill_slots(made, range(NUM_IMAGES), np.random.default_rng(0).normal(size=shape).astype(np.float32))
    return made


@pytest.fixture(scope="module")
def alone(engine):
    """The logit of every pair in a call without other pairs: (text, slot)."""
    logits = np.empty((len(TEXTS), NUM_IMAGES), np.float32)
    for row, text in enumerate(TEXTS):
        queries = engine.encode_queries([text])
        for slot in range(NUM_IMAGES):
            logits[row, slot] = engine.score_pairs(queries, numbers(0), numbers(slot))[0]
    return logits


pairs = st.lists(
    st.tuples(st.integers(0, len(TEXTS) - 1), st.integers(0, NUM_IMAGES - 1)), min_size=1, max_size=MAX_PAIRS
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=pairs, order=st.permutations(range(len(TEXTS))))
def test_no_batch_moves_a_logit(engine, alone, pairs, order):
    """`order` is the order of the texts in the call that encodes them."""
    queries = engine.encode_queries([TEXTS[text] for text in order])
    index_of = {text: index for index, text in enumerate(order)}
    texts, slots = (np.array(column, np.int32) for column in zip(*pairs, strict=True))

    logits = engine.score_pairs(queries, np.array([index_of[text] for text in texts], np.int32), slots)

    np.testing.assert_array_equal(logits, alone[texts, slots])


def test_the_engine_digest_names_the_fixed_sizes(checkpoints, variant, engine):
    free = torch_engine(checkpoints / variant, "int8", engine.dtype)

    assert free.info.engine_digest != engine.info.engine_digest

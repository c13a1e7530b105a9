"""The torch runtime on a real GPU."""

import numpy as np
import pytest

from engine_contract import CAT, DOG, all_scores, fill_slots, numbers
from trt.load import load_engine
from trt.slab.layout import STORAGES

pytestmark = pytest.mark.gpu

#: How far a logit may move with its company and from the CPU, where logits spread over about 1: bf16 kernels of
#: different sizes sum in different orders.
BATCH_TOLERANCE, PARITY_TOLERANCE = 0.05, 0.2


@pytest.fixture(params=STORAGES)
def engine(request, torch_cuda, checkpoint):
    return load(checkpoint, "cuda", request.param)


def load(folder, device, storage):
    sizes = {"num_slots": 24, "max_pairs": 48, "max_images": 12}
    return load_engine("torch", folder, storage=storage, num_threads=None, device=device, **sizes)


def test_a_score_depends_on_its_batch_by_rounding_alone(engine, pixels):
    fill_slots(engine, range(12), engine.encode_images(pixels)[0])

    together = all_scores(engine, [DOG, CAT], 12)

    for text, scores in zip([DOG, CAT], together, strict=True):
        queries = engine.encode_queries([text])
        alone = [engine.score_pairs(queries, numbers(0), numbers(slot))[0] for slot in range(12)]
        np.testing.assert_allclose(scores, alone, atol=BATCH_TOLERANCE)


def test_logits_are_close_to_those_of_the_processor(engine, checkpoint, pixels):
    reference = load(checkpoint, "cpu", engine.info.storage)
    tokens, _ = reference.encode_images(pixels)
    for each in (engine, reference):
        fill_slots(each, range(12), tokens)

    found, expected = (all_scores(each, [DOG, CAT], 12) for each in (engine, reference))

    assert np.abs(found - expected).max() < PARITY_TOLERANCE * expected.std()


def test_slots_are_rewritten_through_the_staging_ring(engine, pixels):
    tokens, _ = engine.encode_images(pixels)
    fill_slots(engine, range(12), tokens)
    before = all_scores(engine, [DOG], 12)

    fill_slots(engine, range(12), tokens[::-1])

    np.testing.assert_allclose(all_scores(engine, [DOG], 12)[0], before[0, ::-1], atol=BATCH_TOLERANCE)


def test_copy_times_are_reported(engine, pixels):
    fill_slots(engine, range(3), engine.encode_images(pixels[:3])[0])
    all_scores(engine, [DOG], 3)

    copies = engine.last_copies()

    assert 0 < copies.to_device_s < 1
    assert 0 < copies.to_host_s < 1


def test_after_warming_up_every_size_is_a_graph_and_calls_repeat_to_the_last_bit(engine, pixels):
    fill_slots(engine, range(12), engine.encode_images(pixels)[0])
    first = all_scores(engine, [DOG, CAT], 12)

    engine.warm_up()
    counts = engine.graph_counts()
    again = [all_scores(engine, [DOG, CAT], 12) for _ in range(3)]

    assert counts.captured > 50
    assert engine.graph_counts() == counts
    assert counts.uncaptured == 0
    np.testing.assert_array_equal(again, [first] * 3)


def test_a_graph_reads_the_slab_as_it_is_when_it_is_replayed(engine, pixels):
    tokens, _ = engine.encode_images(pixels)
    fill_slots(engine, range(12), tokens)
    before = all_scores(engine, [DOG], 12)

    fill_slots(engine, range(12), tokens[::-1])

    np.testing.assert_allclose(all_scores(engine, [DOG], 12)[0], before[0, ::-1], atol=BATCH_TOLERANCE)

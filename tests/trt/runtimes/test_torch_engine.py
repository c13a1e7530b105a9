"""The torch engine: precision, stored tokens and staging."""

import numpy as np
import pytest
import torch

from edje.model.weights import load_checkpoint
from engine_contract import (
    CAT,
    DOG,
    LATE_FUSION,
    all_scores,
    fill_slots,
    numbers,
)
from protocols.quantize import quantize
from small_engines import STAGING_ROWS, constant_engine, torch_engine
from trt.contract import EngineBroken, LimitExceeded
from trt.slab.layout import STORAGES

#: How far stored tokens may move a logit from float32 tokens, in units of the logits' standard deviation. At four bits
#: the worst of 24 logits of the untrained minimal encoder moves by 1.1 of it, a trained model's R@1 not at all.
STORAGE_TOLERANCE = {"fp16": 0.005, "bf16": 0.04, "int8": 0.06, "int4": 1.3}
#: How far bf16 layers may move a logit from float32 layers, in the same unit: 0.14 without AVX512.
BF16_TOLERANCE = 0.2


@pytest.mark.parametrize("variant", ["tiny", *LATE_FUSION])
@pytest.mark.parametrize("storage", STORAGES)
def test_stored_tokens_score_close_to_float32_tokens(checkpoints, pixels, storage, variant):
    engine = torch_engine(checkpoints / variant, storage)
    model = load_checkpoint(checkpoints / variant).model
    tokens, _ = engine.encode_images(pixels)
    fill_slots(engine, range(12), tokens)

    scores = all_scores(engine, [DOG, CAT], 12)

    with torch.inference_mode():
        exact = [
            model.score(model.encode_queries(torch.tensor([text] * 12)), torch.tensor(tokens)) for text in (DOG, CAT)
        ]
    exact = torch.stack(exact).numpy()
    assert np.abs(scores - exact).max() < STORAGE_TOLERANCE[storage] * exact.std()


@pytest.mark.parametrize("variant", ["tiny", *LATE_FUSION])
def test_bf16_layers_score_close_to_float32_layers(checkpoints, pixels, variant):
    exact, fast = (torch_engine(checkpoints / variant, "fp16", dtype) for dtype in (torch.float32, torch.bfloat16))
    tokens, _ = exact.encode_images(pixels)
    for engine in (exact, fast):
        fill_slots(engine, range(12), tokens)

    scores, expected = (all_scores(engine, [DOG, CAT], 12) for engine in (fast, exact))

    assert np.abs(scores - expected).max() < BF16_TOLERANCE * expected.std()


@pytest.mark.parametrize("variant", ["tiny", *LATE_FUSION])
def test_layers_compute_in_the_engines_precision_and_all_else_in_float32(checkpoints, variant):
    joint = torch_engine(checkpoints / variant, "int8", torch.bfloat16)._model.edje.joint

    in_layers, others = set(), set()
    for name, parameter in joint.named_parameters():
        (in_layers if name.split(".")[0].endswith("layers") else others).add(parameter.dtype)

    assert (in_layers, others) == ({torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize("variant", LATE_FUSION)
def test_the_text_layers_run_once_per_query(checkpoints, pixels, variant):
    engine, seen = torch_engine(checkpoints / variant, "int8"), []
    fill_slots(engine, range(12), engine.encode_images(pixels)[0])
    engine._model.edje.joint.text_layers[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))

    queries = engine.encode_queries([DOG, CAT])
    for slot in range(12):
        engine.score_pairs(queries, numbers(0, 1), numbers(slot, slot))

    assert sum(seen) == 2


def test_tokens_that_are_not_finite_reach_the_caller_as_they_are(checkpoint):
    engine = torch_engine(checkpoint, "fp16")
    engine.slab.tokens[0] = 0xFF  # a NaN in half precision

    assert np.isnan(all_scores(engine, [DOG], 1)).all()


def test_staging_wraps_around_without_touching_what_was_published(checkpoint, pixels):
    engine, plain = torch_engine(checkpoint, "int8", staged=True), torch_engine(checkpoint, "int8")
    tokens, _ = engine.encode_images(pixels)

    for slots in (range(7), range(7, 12), range(12, 19), range(3)):  # 22 rows through a ring of 16
        for each in (engine, plain):
            fill_slots(each, slots, tokens[np.array(slots) % 12])

    np.testing.assert_array_equal(all_scores(engine, [DOG], 19), all_scores(plain, [DOG], 19))


def test_only_the_good_rows_of_a_stage_are_published(checkpoint, pixels):
    engine, plain = torch_engine(checkpoint, "int4", staged=True), torch_engine(checkpoint, "int4")
    tokens, _ = engine.encode_images(pixels[:3])
    fill_slots(plain, [2, 9], tokens[[0, 2]])

    rows_tokens, rows_scales, rows = engine.slab.stage([2, 5, 9])
    for row, image in zip(rows, tokens, strict=True):
        values, scales = quantize("int4", image)
        rows_tokens[row], rows_scales[row] = np.frombuffer(values, np.uint8), np.frombuffer(scales, np.uint8)
    engine.slab.publish([2, 9], [rows[0], rows[2]])

    np.testing.assert_array_equal(all_scores(engine, [DOG], 12), all_scores(plain, [DOG], 12))


def test_more_rows_than_the_ring_holds_are_refused(checkpoint):
    with pytest.raises(LimitExceeded, match="staged"):
        torch_engine(checkpoint, "int8", staged=True).slab.stage(range(STAGING_ROWS + 1))


def test_the_engine_digest_differs_for_everything_that_changes_a_score(checkpoint):
    engines = [
        torch_engine(checkpoint, "int8"),
        torch_engine(checkpoint, "int4"),
        torch_engine(checkpoint, "int8", torch.bfloat16),
        constant_engine(checkpoint, "int8"),
    ]

    assert len({engine.info.engine_digest for engine in engines}) == 4
    assert {engine.info.model_digest for engine in engines} == {load_checkpoint(checkpoint).digest}
    assert torch_engine(checkpoint, "int8").info == engines[0].info


def test_a_device_out_of_memory_means_the_process_must_end(checkpoint, monkeypatch):
    engine = torch_engine(checkpoint, "int8")

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._model.edje, "score", out_of_memory)

    with pytest.raises(EngineBroken, match="out of memory"):
        all_scores(engine, [DOG], 1)


def test_the_best_cosines_of_an_explained_pair_are_its_late_interaction(checkpoints, pixels):
    engine = torch_engine(checkpoints / "tiny-maxsim", "int8")
    fill_slots(engine, range(12), engine.encode_images(pixels)[0])
    match = load_checkpoint(checkpoints / "tiny-maxsim").model.joint.match
    pair_query, pair_slot = np.int32([0, 1, 0]), np.int32([3, 5, 7])

    found = engine.token_similarities([DOG, CAT], pair_query, pair_slot)

    logits = engine.score_pairs(engine.encode_queries([DOG, CAT]), pair_query, pair_slot)
    scale, bias = match.log_scale.exp().item(), match.bias.item()
    assert [each.shape[0] for each in found] == [len(DOG), len(CAT), len(DOG)]
    np.testing.assert_allclose([scale * each.max(axis=1).mean() + bias for each in found], logits, atol=0.05)
    assert all(np.abs(each).max() <= 1 + 1e-5 for each in found)


def test_a_model_without_a_late_interaction_cannot_explain(checkpoints):
    assert not torch_engine(checkpoints / "tiny", "int8").can_explain()

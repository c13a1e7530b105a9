"""The table of derived rows: which are valid, which must be computed, and the logits of both."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edje.model.variants import VARIANTS
from engine_contract import CAT, DOG, LATE_FUSION, all_scores, fill_slots, numbers
from small_engines import graphed_engine, torch_engine
from trt.contract import EngineUnavailable, LimitExceeded
from trt.load import slots_in
from trt.slab.derived import RowTable, keys_values_row, match_row
from trt.slab.layout import STORAGES

calls = st.lists(
    st.tuples(st.sampled_from(["publish", "assign"]), st.lists(st.integers(0, 9), min_size=1, max_size=6)), max_size=30
)


@given(calls, st.integers(6, 10))
def test_a_row_always_holds_the_last_content_of_its_slot(calls, num_rows):
    table, versions = RowTable(10, num_rows), np.zeros(10, np.uint32)
    held = {}  # row: slot and version that were computed

    for what, slots in calls:
        slots = numbers(*slots)
        if what == "publish":
            versions[slots] += 1
            continue
        found = table.assign(slots, versions)
        held.update({row: (slot, versions[slot]) for slot, row in zip(found.new_slots, found.new_rows, strict=True)})
        assert [held[row] for row in found.rows] == [(slot, versions[slot]) for slot in slots]
        assert len(np.unique(found.new_rows)) == len(found.new_rows)


def test_a_row_is_computed_once_and_again_after_its_slot_is_published():
    table, versions = RowTable(4, 4), np.zeros(4, np.uint32)
    first = table.assign(numbers(2, 1, 2), versions)
    again = table.assign(numbers(1, 2, 3), versions)
    versions[1] += 1

    changed = table.assign(numbers(1, 2), versions)

    assert [each.new_slots.tolist() for each in (first, again, changed)] == [[1, 2], [3], [1]]
    assert first.rows.tolist() == [2, 1, 2]


def test_the_slots_used_last_keep_their_rows():
    table, versions = RowTable(9, 3), np.zeros(9, np.uint32)
    for slot in (0, 1, 2, 0, 3):
        table.assign(numbers(slot), versions)

    assert table.assign(numbers(0, 2, 3), versions).new_slots.tolist() == []
    assert table.assign(numbers(1), versions).new_slots.tolist() == [1]


def test_more_slots_in_one_step_than_rows_are_refused():
    with pytest.raises(LimitExceeded, match="4 images in one step, but only 3 derived rows"):
        RowTable(9, 3).assign(numbers(0, 1, 2, 3), np.zeros(9, np.uint32))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("variant", LATE_FUSION)
@pytest.mark.parametrize("make", [torch_engine, graphed_engine], ids=["direct", "graphs"])
def test_logits_and_ranks_are_those_of_the_model_over_the_stored_tokens(checkpoints, variant, storage, make, pixels):
    engine = make(checkpoints / variant, storage)
    plain = torch_engine(checkpoints / variant, storage)
    tokens, _ = plain.encode_images(pixels)
    for each in (engine, plain):
        fill_slots(each, range(12), tokens)

    found = all_scores(engine, [DOG, CAT], 12)

    model, stored = plain._model.edje, plain._model._tokens(torch.arange(12))
    with torch.inference_mode():
        texts = [model.encode_queries(torch.tensor([text] * 12)) for text in (DOG, CAT)]
        expected = torch.stack([model.score(text, stored) for text in texts]).numpy()
    np.testing.assert_allclose(found, expected, atol=3e-3 * expected.std())
    np.testing.assert_array_equal(found.argsort(axis=1), expected.argsort(axis=1))


@pytest.mark.parametrize("make", [torch_engine, graphed_engine], ids=["direct", "graphs"])
def test_an_image_is_projected_once_until_its_slot_is_published_again(checkpoints, make, pixels):
    engine = make(checkpoints / "tiny-maxsim", "int8")
    tokens, _ = engine.encode_images(pixels)
    fill_slots(engine, range(12), tokens)
    projected = []
    engine._model._match.visual.register_forward_hook(lambda _, inputs, __: projected.append(len(inputs[0])))

    for _ in range(3):
        all_scores(engine, [DOG, CAT], 6)
    all_scores(engine, [DOG], 12)
    fill_slots(engine, [4, 20], tokens[:2])
    all_scores(engine, [CAT], 12)

    assert projected == [6, 6, 1]


@pytest.mark.parametrize("make", [torch_engine, graphed_engine], ids=["direct", "graphs"])
@pytest.mark.parametrize("hot_images", [5, 12, 100])
def test_kept_keys_and_values_give_the_same_logits_however_many_fit(checkpoints, make, hot_images, pixels):
    engine = make(checkpoints / "tiny-minimal", "int8", hot_images=hot_images)
    plain = torch_engine(checkpoints / "tiny-minimal", "int8")
    tokens, _ = plain.encode_images(pixels)
    for each in (engine, plain):
        fill_slots(each, range(12), tokens)

    for _ in range(2):
        np.testing.assert_allclose(all_scores(engine, [DOG, CAT], 12), all_scores(plain, [DOG, CAT], 12), atol=1e-5)
    for each in (engine, plain):
        fill_slots(each, [3], tokens[7:8])
    np.testing.assert_allclose(all_scores(engine, [DOG, CAT], 12), all_scores(plain, [DOG, CAT], 12), atol=1e-5)


def test_keys_and_values_of_hot_images_are_computed_once(checkpoints, pixels):
    engine = torch_engine(checkpoints / "tiny-minimal", "int8", hot_images=12)
    fill_slots(engine, range(12), engine.encode_images(pixels)[0])
    seen = []
    engine._model.edje.joint.layers[0].visual_kv.register_forward_hook(
        lambda _, inputs, __: seen.append(len(inputs[0]))
    )

    for _ in range(3):
        all_scores(engine, [DOG, CAT], 12)

    assert sum(seen) == 12


def test_hot_images_of_an_encoder_without_keys_and_values_are_refused(checkpoints):
    with pytest.raises(EngineUnavailable, match="only an encoder of kind 'minimal'"):
        torch_engine(checkpoints / "tiny-late", "int8", hot_images=5)


def test_rows_have_the_sizes_of_the_paper_sized_models():
    minimal = VARIANTS["paper-l16-minimal"]

    assert match_row(minimal).num_bytes == 64 * 128 * 2
    assert keys_values_row(minimal, "bfloat16").num_bytes == 4 * 2 * 64 * 384 * 2
    assert match_row(VARIANTS["paper-l16"]) is None
    assert match_row(replace(minimal, joint=replace(minimal.joint, match_dim=0))) is None
    assert keys_values_row(VARIANTS["paper-l16-late"], "bfloat16") is None


def test_derived_rows_count_into_the_bytes_of_the_slab(checkpoints):
    tokens, match = 16 * 64 + 4 * 16, 16 * 32 * 2
    checkpoint, budget = checkpoints / "tiny-minimal", 100_000

    assert slots_in(budget, checkpoints / "tiny", "int8") == budget // tokens
    assert slots_in(budget, checkpoint, "int8") == budget // (tokens + match)
    assert slots_in(budget, checkpoint, "int8", runtime="constant") == budget // tokens
    with_hot = slots_in(budget, checkpoint, "int8", hot_images=3)
    assert with_hot < slots_in(budget, checkpoint, "int8") - 3
    with pytest.raises(EngineUnavailable, match="the keys and values of 1000 hot images take"):
        slots_in(budget, checkpoint, "int8", hot_images=1000)

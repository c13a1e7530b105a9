"""One contract for every engine, and how close the torch engine's stored tokens keep it to float32."""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edje.config import FirstStageConfig
from edje.init import initialise
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint
from engine_directories import FIRST_LIMIT_S, sample
from protocols.quantize import quantize
from recorded_engine import open_recorded
from torch_recorder import done_again
from trt.contract import EngineBroken, EngineMismatch, EngineUnavailable, LimitExceeded
from trt.load import load_engine
from trt.runtimes.constant_engine import ConstantEngine
from trt.runtimes.grouping import MAX_PADDING, MIN_GROUP_PAIRS, groups_by_length
from trt.runtimes.torch_engine import TorchEngine, fastest_dtype
from trt.slab.host import SharedSlab, StagedSlab
from trt.slab.layout import STORAGES, SlotLayout

CPU = torch.device("cpu")
NUM_SLOTS, MAX_PAIRS, MAX_IMAGES, STAGING_ROWS = 24, 48, 12, 16
DOG, CAT = [2, 40, 41, 42, 3], [2, 43, 44, 3]

#: How far a logit may move with what else is in its batch: rounding of the layers' precision, nothing else.
#: Logits of the untrained model spread over about 1. Measured with AVX512: 1e-6 in float32 (2e-6 at the paper's
#: size) and 1e-6 in bf16, where other processors may choose other kernels for other batch sizes.
BATCH_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
#: How far stored tokens may move a logit from float32 tokens, in units of the logits' own spread. At four bits the
#: worst of 24 logits of the untrained minimal encoder moves by 1.1 of it, a trained model's R@1 not at all.
STORAGE_TOLERANCE = {"fp16": 0.005, "bf16": 0.04, "int8": 0.06, "int4": 1.3}
#: How far bf16 layers may move a logit from float32 layers, likewise in units of the spread: 0.14 without AVX512.
BF16_TOLERANCE = 0.2

APART = ("tiny-late", "tiny-minimal", "tiny-maxsim")
FIRST_STAGE = FirstStageConfig(mean=0.3, std=0.1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Every kind of encoder, small; `tiny-scored` and the like read the first stage's score."""
    root = tmp_path_factory.mktemp("engines")
    for name in ("tiny", *APART):
        config = VARIANTS[name]
        initialise(config, root / name, seed=1)
        joint = replace(config.joint, first_stage=FIRST_STAGE)
        initialise(replace(config, joint=joint), root / f"{name}-scored", seed=1)
    return root


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    return checkpoints / "tiny"


def torch_engine(checkpoint, storage, dtype=torch.float32, *, staged=False, record=None):
    loaded = load_checkpoint(checkpoint)
    layout = SlotLayout(storage, loaded.config.adapter.num_tokens, loaded.config.joint.dim)
    slab = StagedSlab(layout, NUM_SLOTS, CPU, STAGING_ROWS) if staged else SharedSlab(layout, NUM_SLOTS)
    sizes = {"max_pairs": MAX_PAIRS, "max_images": MAX_IMAGES}
    return TorchEngine(loaded, slab=slab, device=CPU, dtype=dtype, record=record, **sizes)


def constant_engine(checkpoint, storage, ms_per_item=0.0):
    return load_engine(
        "constant",
        checkpoint,
        storage=storage,
        num_slots=NUM_SLOTS,
        max_pairs=MAX_PAIRS,
        max_images=MAX_IMAGES,
        num_threads=None,
        device="cpu",
        constant_ms_per_item=ms_per_item,
    )


@functools.cache  # it takes a second to open, and what one test leaves in the slots is nothing to the next
def tensorrt_engine(checkpoint, storage):
    """Over recorded bindings, which compute in float32 with torch."""
    directory = checkpoint.with_name(f"{checkpoint.name}-{storage}-engine")
    return open_recorded(
        checkpoint,
        directory,
        storage,
        num_slots=NUM_SLOTS,
        max_pairs=MAX_PAIRS,
        max_images=MAX_IMAGES,
        device="cuda",
    )


@functools.cache
def onnx_engine(made):
    """The graphs that were exported of a checkpoint of the same size."""
    return load_engine(
        "onnx",
        made.checkpoint,
        storage="int8",
        num_slots=NUM_SLOTS,
        max_pairs=MAX_PAIRS,
        max_images=MAX_IMAGES,
        num_threads=1,
        device="cpu",
        engine_directory=made.engine,
    )


KINDS = {
    "tensorrt": tensorrt_engine,
    "constant": constant_engine,
    "torch": torch_engine,
    "torch-bf16": lambda checkpoint, storage: torch_engine(checkpoint, storage, torch.bfloat16),
    "torch-graphs": lambda checkpoint, storage: torch_engine(checkpoint, storage, record=done_again),
    "torch-staged": lambda checkpoint, storage: torch_engine(checkpoint, storage, staged=True),
}


@pytest.fixture(
    params=[
        *((kind, storage, "tiny") for kind in KINDS for storage in STORAGES),
        *((kind, "int8", variant) for kind in ("torch", "torch-bf16", "torch-graphs", "tensorrt") for variant in APART),
        # Other storage types and encoders: test_onnx_engine.
        pytest.param(("onnx", "int8", "full"), marks=pytest.mark.timeout(FIRST_LIMIT_S), id="onnx-int8-full"),
    ],
    ids="-".join,
)
def engine(request, checkpoints):
    kind, storage, variant = request.param
    if kind == "onnx":
        return onnx_engine(sample(request.getfixturevalue("tmp_path_factory"), variant))
    return KINDS[kind](checkpoints / variant, storage)


@pytest.fixture(scope="module")
def pixels():
    """Smooth pictures, no two alike: noise looks the same to a pooling head."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(16, axis=2).repeat(16, axis=3)


def fill(engine, slots, tokens):
    """Store these tokens, as the rerank worker does with blobs."""
    rows_tokens, rows_scales, rows = engine.slab.stage(slots)
    for row, image in zip(rows, tokens, strict=True):
        values, scales = quantize(engine.info.storage, image)
        rows_tokens[row] = np.frombuffer(values, np.uint8)
        rows_scales[row] = np.frombuffer(scales, np.uint8)
    engine.slab.publish(slots, rows)


def numbers(*values):
    return np.array(values, np.int32)


def all_scores(engine, texts, num_images, first_stage=None):
    query, slot = np.divmod(np.arange(len(texts) * num_images, dtype=np.int32), num_images)
    scores = engine.score_pairs(engine.encode_queries(texts), query, slot, first_stage)
    return scores.reshape(len(texts), num_images)


def test_an_image_becomes_finite_tokens_of_the_announced_shape(engine, pixels):
    tokens, pooled = engine.encode_images(pixels[:3])

    assert tokens.shape == (3, engine.info.num_visual_tokens, engine.info.token_dim)
    assert pooled.shape == (3, 64)
    assert tokens.dtype == pooled.dtype == np.float32
    assert np.isfinite(tokens).all()
    assert np.abs(tokens[0] - tokens[1]).max() > 0.01


def test_equal_images_become_equal_tokens_wherever_they_stand(engine, pixels):
    tokens, _ = engine.encode_images(pixels[[0, 1, 0]])

    np.testing.assert_allclose(tokens[0], tokens[2], atol=1e-4)


def test_every_pair_gets_a_finite_logit_of_its_own(engine, pixels):
    fill(engine, range(6), engine.encode_images(pixels[:6])[0])

    scores = all_scores(engine, [DOG, CAT], 6)

    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 6


def test_the_same_call_gives_the_same_logits(engine, pixels):
    fill(engine, range(6), engine.encode_images(pixels[:6])[0])

    np.testing.assert_array_equal(all_scores(engine, [DOG], 6), all_scores(engine, [DOG], 6))


def test_scoring_that_comes_back_is_recorded_once_for_each_text_length(checkpoint, pixels):
    engine = torch_engine(checkpoint, "int8", record=done_again)
    fill(engine, range(12), engine.encode_images(pixels)[0])

    scores = [all_scores(engine, [DOG, CAT], 12) for _ in range(3)]

    assert engine.num_graphs == 2
    np.testing.assert_allclose(scores[1:], scores[:1] * 2, atol=1e-5)


def test_a_rewritten_slot_changes_its_score_and_no_other(engine, pixels):
    tokens, _ = engine.encode_images(pixels[:4])
    fill(engine, [0, 1, 2], tokens[:3])
    before = all_scores(engine, [DOG], 3)[0]

    fill(engine, [1], tokens[3:])

    after = all_scores(engine, [DOG], 3)[0]
    assert after[1] != before[1]
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


def test_slots_may_be_written_and_read_in_any_order(engine, pixels):
    tokens, _ = engine.encode_images(pixels[:3])
    fill(engine, [0, 1, 2], tokens)
    in_order = all_scores(engine, [DOG], 3)[0]

    fill(engine, [7, 3, 20], tokens)

    queries = engine.encode_queries([DOG])
    np.testing.assert_array_equal(engine.score_pairs(queries, numbers(0, 0, 0), numbers(7, 3, 20)), in_order)


def test_a_staged_row_that_is_not_published_changes_nothing_published(engine, pixels):
    tokens, _ = engine.encode_images(pixels[:2])
    fill(engine, [0], tokens[:1])
    before = all_scores(engine, [DOG], 1)
    fill(engine, [5, 6], tokens)

    rows_tokens, _, rows = engine.slab.stage([3, 4])
    rows_tokens[list(rows)] = 255
    engine.slab.publish([], [])

    np.testing.assert_array_equal(all_scores(engine, [DOG], 1), before)


def test_a_score_depends_on_its_batch_by_rounding_alone(engine, pixels):
    texts = [DOG, CAT, [2, *range(30, 60), 3], [2, *range(60, 65), 3]]
    fill(engine, range(12), engine.encode_images(pixels)[0])
    dtype = torch.bfloat16 if getattr(engine, "_dtype", None) == torch.bfloat16 else torch.float32

    together = all_scores(engine, texts, 12)

    for text, scores in zip(texts, together, strict=True):
        queries = engine.encode_queries([text])
        alone = [engine.score_pairs(queries, numbers(0), numbers(slot))[0] for slot in range(12)]
        np.testing.assert_allclose(scores, alone, atol=BATCH_TOLERANCE[dtype])


def test_the_order_of_pairs_is_the_order_of_logits(engine, pixels):
    fill(engine, range(6), engine.encode_images(pixels[:6])[0])
    scores = all_scores(engine, [DOG, CAT], 6)
    queries = engine.encode_queries([DOG, CAT])
    query, slot = numbers(1, 0, 1, 0, 1, 0, 0), numbers(5, 5, 0, 3, 2, 2, 2)

    np.testing.assert_allclose(engine.score_pairs(queries, query, slot), scores[query, slot], atol=0.03)


def test_no_pairs_give_no_logits(engine):
    assert engine.score_pairs(engine.encode_queries([DOG]), numbers(), numbers()).shape == (0,)
    assert engine.score_pairs(engine.encode_queries([]), numbers(), numbers()).shape == (0,)


@pytest.mark.parametrize(
    ("query", "slot"),
    [
        (numbers(2), numbers(0)),
        (numbers(-1), numbers(0)),
        (numbers(0), numbers(NUM_SLOTS)),
        (numbers(0), numbers(-1)),
        (numbers(0, 0), numbers(0)),
        (numbers(*[0] * (MAX_PAIRS + 1)), numbers(*[0] * (MAX_PAIRS + 1))),
    ],
    ids=["query", "negative query", "slot", "negative slot", "uneven", "too many"],
)
def test_wrong_numbers_are_refused(engine, query, slot):
    queries = engine.encode_queries([DOG, CAT])

    with pytest.raises(LimitExceeded):
        engine.score_pairs(queries, query, slot)


@pytest.mark.parametrize(
    "first_stage",
    [np.zeros(2, np.float64), np.zeros(3, np.float32), np.zeros((2, 1), np.float32)],
    ids=["double", "too many", "not flat"],
)
def test_first_stage_scores_of_another_shape_or_type_are_refused(engine, first_stage):
    with pytest.raises(LimitExceeded, match="first-stage"):
        engine.score_pairs(engine.encode_queries([DOG]), numbers(0, 0), numbers(0, 1), first_stage)


def test_an_engine_that_does_not_read_the_first_stage_scores_as_without(engine, pixels):
    fill(engine, range(3), engine.encode_images(pixels[:3])[0])

    scores = all_scores(engine, [DOG], 3, np.array([0.1, np.nan, 3e38], np.float32))

    assert not engine.info.reads_first_stage
    np.testing.assert_array_equal(scores, all_scores(engine, [DOG], 3))


scored = pytest.mark.parametrize("variant", ["tiny-scored", *(f"{name}-scored" for name in APART)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


def scored_engine(checkpoints, variant, pixels, dtype=torch.float32):
    engine = torch_engine(checkpoints / variant, "int8", dtype)
    fill(engine, range(12), engine.encode_images(pixels)[0])
    return engine


@scored
@dtypes
def test_each_pair_is_scored_with_its_own_first_stage_score(checkpoints, variant, dtype, pixels):
    engine = scored_engine(checkpoints, variant, pixels, dtype)
    texts = [DOG, CAT, [2, *range(30, 60), 3]]
    given = np.random.default_rng(0).normal(0.3, 0.1, 36).astype(np.float32)
    given[::5] = np.nan

    together = all_scores(engine, texts, 12, given)

    assert engine.info.reads_first_stage
    for text, scores, own in zip(texts, together, given.reshape(3, 12), strict=True):
        queries = engine.encode_queries([text])
        alone = [engine.score_pairs(queries, numbers(0), numbers(slot), own[[slot]])[0] for slot in range(12)]
        np.testing.assert_allclose(scores, alone, atol=BATCH_TOLERANCE[dtype])


@scored
@dtypes
def test_another_first_stage_score_gives_another_logit(checkpoints, variant, dtype, pixels):
    engine = scored_engine(checkpoints, variant, pixels, dtype)
    low, high = np.full(12, 0.2, np.float32), np.full(12, 0.2, np.float32)
    high[4] = 0.45

    changed = all_scores(engine, [DOG], 12, low)[0] != all_scores(engine, [DOG], 12, high)[0]

    assert np.flatnonzero(changed).tolist() == [4]


@scored
def test_no_first_stage_scores_are_the_same_as_a_missing_one_for_each_pair(checkpoints, variant, pixels):
    engine = scored_engine(checkpoints, variant, pixels)

    without = all_scores(engine, [DOG, CAT], 12)

    assert np.isfinite(without).all()
    missing = np.full(24, np.nan, np.float32)
    np.testing.assert_array_equal(without, all_scores(engine, [DOG, CAT], 12, missing))
    assert (without != all_scores(engine, [DOG, CAT], 12, np.full(24, 0.3, np.float32))).all()


@pytest.mark.parametrize(
    "text", [[], [2] * 64, [2, 1_024, 3], [2, -1, 3]], ids=["empty", "long", "unknown", "negative"]
)
def test_texts_the_model_cannot_read_are_refused(engine, text):
    with pytest.raises(LimitExceeded):
        engine.encode_queries([DOG, text])


def test_the_longest_text_is_read(engine):
    assert np.isfinite(all_scores(engine, [[2] * engine.info.max_text_tokens], 1)).all()


@pytest.mark.parametrize("shape", [(MAX_IMAGES + 1, 3, 64, 64), (1, 3, 32, 64), (1, 64, 64, 3), (3, 64, 64)])
def test_pixels_of_another_shape_or_too_many_are_refused(engine, shape):
    with pytest.raises(LimitExceeded):
        engine.encode_images(np.zeros(shape, np.uint8))


def test_pixels_that_are_not_bytes_are_refused(engine):
    with pytest.raises(LimitExceeded):
        engine.encode_images(np.zeros((1, 3, 64, 64), np.float32))  # type: ignore[arg-type]


def test_read_only_pixels_are_read(engine, pixels):
    frozen = pixels[:1].copy()
    frozen.flags.writeable = False

    engine.encode_images(frozen)


def test_warming_up_leaves_the_slots_alone(engine, pixels):
    fill(engine, range(3), engine.encode_images(pixels[:3])[0])
    before = all_scores(engine, [DOG], 3)

    engine.warm_up()

    np.testing.assert_array_equal(all_scores(engine, [DOG], 3), before)


@pytest.mark.parametrize("variant", ["tiny", *APART])
@pytest.mark.parametrize("storage", STORAGES)
def test_stored_tokens_score_close_to_float32_tokens(checkpoints, pixels, storage, variant):
    engine = torch_engine(checkpoints / variant, storage)
    model = load_checkpoint(checkpoints / variant).model
    tokens, _ = engine.encode_images(pixels)
    fill(engine, range(12), tokens)

    scores = all_scores(engine, [DOG, CAT], 12)

    with torch.inference_mode():
        exact = [
            model.score(model.encode_queries(torch.tensor([text] * 12)), torch.tensor(tokens)) for text in (DOG, CAT)
        ]
    exact = torch.stack(exact).numpy()
    assert np.abs(scores - exact).max() < STORAGE_TOLERANCE[storage] * exact.std()


@pytest.mark.parametrize("variant", ["tiny", *APART])
def test_bf16_layers_score_close_to_float32_layers(checkpoints, pixels, variant):
    exact, fast = (torch_engine(checkpoints / variant, "fp16", dtype) for dtype in (torch.float32, torch.bfloat16))
    tokens, _ = exact.encode_images(pixels)
    for engine in (exact, fast):
        fill(engine, range(12), tokens)

    scores, expected = (all_scores(engine, [DOG, CAT], 12) for engine in (fast, exact))

    assert np.abs(scores - expected).max() < BF16_TOLERANCE * expected.std()


@pytest.mark.parametrize("variant", ["tiny", *APART])
def test_layers_compute_in_the_engines_precision_and_all_else_in_float32(checkpoints, variant):
    joint = torch_engine(checkpoints / variant, "int8", torch.bfloat16)._model.joint

    in_layers, others = set(), set()
    for name, parameter in joint.named_parameters():
        (in_layers if name.split(".")[0].endswith("layers") else others).add(parameter.dtype)

    assert (in_layers, others) == ({torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize("variant", APART)
def test_the_text_layers_run_once_per_query(checkpoints, pixels, variant):
    engine, seen = torch_engine(checkpoints / variant, "int8"), []
    fill(engine, range(12), engine.encode_images(pixels)[0])
    engine._model.joint.text_layers[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))

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
            fill(each, slots, tokens[np.array(slots) % 12])

    np.testing.assert_array_equal(all_scores(engine, [DOG], 19), all_scores(plain, [DOG], 19))


def test_only_the_good_rows_of_a_stage_are_published(checkpoint, pixels):
    engine, plain = torch_engine(checkpoint, "int4", staged=True), torch_engine(checkpoint, "int4")
    tokens, _ = engine.encode_images(pixels[:3])
    fill(plain, [2, 9], tokens[[0, 2]])

    rows_tokens, rows_scales, rows = engine.slab.stage([2, 5, 9])
    for row, image in zip(rows, tokens, strict=True):
        values, scales = quantize("int4", image)
        rows_tokens[row], rows_scales[row] = np.frombuffer(values, np.uint8), np.frombuffer(scales, np.uint8)
    engine.slab.publish([2, 9], [rows[0], rows[2]])

    np.testing.assert_array_equal(all_scores(engine, [DOG], 12), all_scores(plain, [DOG], 12))


def test_more_rows_than_the_ring_holds_are_refused(checkpoint):
    with pytest.raises(LimitExceeded, match="staged"):
        torch_engine(checkpoint, "int8", staged=True).slab.stage(range(STAGING_ROWS + 1))


@pytest.mark.parametrize(
    ("storage", "token_bytes", "scale_bytes"),
    [("fp16", 49_152, 0), ("bf16", 49_152, 0), ("int8", 24_576, 256), ("int4", 12_288, 1_536)],
)
def test_a_slot_has_the_published_size(storage, token_bytes, scale_bytes):
    layout = SlotLayout(storage, num_tokens=64, token_dim=384)

    assert (layout.token_bytes, layout.scale_bytes) == (token_bytes, scale_bytes)


@given(lengths=st.lists(st.integers(2, 63), max_size=60), max_pairs=st.integers(1, 20))
def test_grouping_keeps_every_pair_once_and_pads_little(lengths, max_pairs):
    lengths = np.array(lengths, np.int64)

    groups = list(groups_by_length(lengths, max_pairs))

    assert sorted(np.concatenate([*groups, np.empty(0, np.int64)])) == list(range(len(lengths)))
    for group in groups:
        spread = np.ptp(lengths[group])
        assert 1 <= len(group) <= max_pairs
        assert spread == 0 or (len(group) <= MIN_GROUP_PAIRS and spread <= MAX_PADDING)


def test_one_request_is_never_padded():
    groups = list(groups_by_length(np.full(100, 17), max_pairs=32))

    assert [len(group) for group in groups] == [32, 32, 32, 4]


def test_the_engine_digest_tells_apart_what_changes_a_score(checkpoint):
    engines = [
        torch_engine(checkpoint, "int8"),
        torch_engine(checkpoint, "int4"),
        torch_engine(checkpoint, "int8", torch.bfloat16),
        constant_engine(checkpoint, "int8"),
    ]

    assert len({engine.info.engine_digest for engine in engines}) == 4
    assert {engine.info.model_digest for engine in engines} == {load_checkpoint(checkpoint).digest}
    assert torch_engine(checkpoint, "int8").info == engines[0].info


def load(checkpoint, **changes):
    settings = {"runtime": "torch", "storage": "int8", "num_threads": None, "device": "cpu"} | changes
    runtime = settings.pop("runtime")
    return load_engine(runtime, checkpoint, num_slots=NUM_SLOTS, max_pairs=MAX_PAIRS, max_images=MAX_IMAGES, **settings)


def test_the_loader_picks_the_precision_of_the_processor(checkpoint):
    engine = load(checkpoint, num_threads=torch.get_num_threads())

    assert isinstance(engine, TorchEngine)
    assert engine.info.engine_digest == torch_engine(checkpoint, "int8", fastest_dtype(CPU)).info.engine_digest


def test_an_engine_that_only_encodes_needs_no_slots(checkpoint, pixels):
    engine = load_engine(
        "torch", checkpoint, storage="int8", num_slots=0, max_pairs=1, max_images=2, num_threads=None, device="cpu"
    )

    engine.warm_up()

    assert engine.encode_images(pixels[:2])[0].shape == (2, 16, 64)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"runtime": "jax"}, "choose torch, tensorrt, onnx or constant"),
        ({"device": "tpu"}, "choose cpu"),
        ({"device": "meta"}, "choose cpu"),
        ({"device": "cuda:99"}, "choose cpu"),
        ({"storage": "fp3"}, "choose one of"),
        ({"runtime": "constant", "storage": "fp3"}, "choose one of"),
    ],
)
def test_what_this_machine_lacks_is_named_with_a_remedy(checkpoint, changes, remedy):
    with pytest.raises(EngineUnavailable, match=remedy):
        load(checkpoint, **changes)


@pytest.mark.parametrize("runtime", ["torch", "constant"])
def test_a_folder_that_is_no_checkpoint_is_a_mismatch(tmp_path, runtime):
    with pytest.raises(EngineMismatch, match=r"edje\.init"):
        load(tmp_path, runtime=runtime)


def test_a_device_out_of_memory_means_the_process_must_end(checkpoint, monkeypatch):
    engine = torch_engine(checkpoint, "int8")

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._model, "score", out_of_memory)

    with pytest.raises(EngineBroken, match="out of memory"):
        all_scores(engine, [DOG], 1)


def test_the_constant_engine_takes_the_time_it_is_told(checkpoint, pixels, monkeypatch):
    slept = []
    monkeypatch.setattr("trt.runtimes.constant_engine.time.sleep", slept.append)
    engine = constant_engine(checkpoint, "int8", ms_per_item=2.0)

    engine.encode_images(pixels[:3])
    all_scores(engine, [DOG, CAT], 5)

    assert isinstance(engine, ConstantEngine)
    assert slept == pytest.approx([0.006, 0.020])


def test_the_constant_engine_does_not_import_torch(checkpoint):
    script = f"""
import sys, pathlib
from trt.load import load_engine
load_engine("constant", pathlib.Path({str(checkpoint)!r}), storage="int8", num_slots=1, max_pairs=1, max_images=1,
            num_threads=None, device="cpu")
sys.exit('torch' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2]).returncode == 0

"""ONNX Runtime over an engine directory; the contract of every engine is tested in `tests/trt/test_contract.py`."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.progress import Progress

from edje.model.weights import load_checkpoint
from edje.optional import PackageMissing
from engine_directories import FIRST_LIMIT_S, KINDS, MAX_IMAGES, MAX_PAIRS, copy_of, sample
from trt.check.pairs import parity_pairs
from trt.check.reporting import report_on, scored, torch_reference
from trt.contract import EngineBroken, EngineMismatch, EngineUnavailable, LimitExceeded
from trt.load import load_engine
from trt.manifest import GraphFiles, digest_file, read_manifest, write_manifest
from trt.parity import THRESHOLDS
from trt.runtimes import onnx_engine
from trt.runtimes.bf16_rounding import has_bfloat16, round_to_bfloat16
from trt.runtimes.onnx_engine import OnnxEngine

pytestmark = pytest.mark.timeout(FIRST_LIMIT_S)

NUM_SLOTS = 6
SHOWN = Progress(disable=True)


def load(made, directory=None, **changes):
    asked = {"storage": made.options.storage, "max_pairs": MAX_PAIRS, "max_images": MAX_IMAGES} | changes
    return load_engine(
        "onnx",
        made.checkpoint,
        engine_directory=directory or made.engine,
        num_slots=NUM_SLOTS,
        num_threads=1,
        **({"device": "cpu"} | asked),
    )


@pytest.fixture(params=list(KINDS))
def made(request, tmp_path_factory):
    return sample(tmp_path_factory, request.param)


@pytest.fixture
def full(tmp_path_factory):
    return sample(tmp_path_factory, "full")


def test_every_kind_of_encoder_agrees_with_torch_on_texts_of_every_length(made):
    config = load_checkpoint(made.checkpoint).config
    held = parity_pairs(config, None, num_texts=15, num_images=NUM_SLOTS)
    reference = scored(torch_reference(load_checkpoint(made.checkpoint), made.options.storage, NUM_SLOTS), held, SHOWN)

    report = report_on(load(made), reference, held, THRESHOLDS[made.options.precision], SHOWN)

    assert {len(text) for text in held.texts} >= {2, config.preprocess.max_text_tokens}
    # An untrained model's best candidates lie close together: of so few texts one may find another one best.
    assert report.agreement.top1 >= (1.0 if made.options.precision == "fp32" else 0.8)
    assert report.agreement.tau >= report.thresholds.tau - 0.03
    assert report.agreement.max_error <= report.thresholds.max_error


def test_a_call_of_one_and_a_call_of_all_are_the_same_graph(made):
    """Sizes of 1 are those that tracing likes to take for constants."""
    engine = load(made)
    random = np.random.default_rng(0)
    engine.encode_images(random.integers(0, 256, (1, 3, 64, 64), dtype=np.uint8))
    texts = [[2, 3], [2, *range(30, 40), 3]]

    together = engine.score_pairs(engine.encode_queries(texts), np.array([0, 1], np.int32), np.array([0, 1], np.int32))

    alone = engine.score_pairs(engine.encode_queries(texts[:1]), np.zeros(1, np.int32), np.zeros(1, np.int32))
    assert alone.shape == (1,)
    np.testing.assert_allclose(alone[0], together[0], atol={"fp32": 1e-5}.get(made.options.precision, 0.05))


def test_padding_moves_no_logit(full):
    engine = load(full)
    short, long = [2, 40, 41, 3], [2, *range(30, 34), 3]  # both in the first bucket, so they are padded together

    together = engine.score_pairs(
        engine.encode_queries([short, long]), np.array([0, 1], np.int32), np.zeros(2, np.int32)
    )

    alone = engine.score_pairs(engine.encode_queries([short]), np.zeros(1, np.int32), np.zeros(1, np.int32))
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)


def test_a_token_that_is_not_finite_makes_a_logit_that_is_not_finite(tmp_path_factory):
    made = sample(tmp_path_factory, "minimal")
    engine = load(made)
    engine.slab.tokens[2] = 0xFF  # a NaN in half precision

    logits = engine.score_pairs(
        engine.encode_queries([[2, 40, 3]]), np.zeros(3, np.int32), np.arange(3, dtype=np.int32)
    )

    assert np.isfinite(logits).tolist() == [True, True, False]


def test_an_infinite_scale_makes_a_logit_that_is_not_finite(full):
    engine = load(full)
    engine.slab.tokens[1] = 1
    engine.slab.scales[1].view(np.float32)[:] = np.inf

    logits = engine.score_pairs(
        engine.encode_queries([[2, 40, 3]]), np.zeros(2, np.int32), np.arange(2, dtype=np.int32)
    )

    assert np.isfinite(logits).tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"storage": "fp16"}, "reads int8 tokens, the store holds fp16.*python -m trt.build .*--storage fp16"),
        ({"max_pairs": MAX_PAIRS + 1}, "takes at most 48 pairs in one call.*python -m trt.build .*--max-pairs 49"),
        ({"max_images": MAX_IMAGES + 1}, "takes at most 12 images in one call.*python -m trt.build .*--max-images 13"),
    ],
)
def test_what_the_engine_was_not_built_for_is_refused_with_the_command_that_builds_it(full, changes, said):
    with pytest.raises(EngineMismatch, match=said):
        load(full, **changes)


def test_a_gpu_is_refused_for_onnx_runtime(full):
    with pytest.raises(EngineUnavailable, match="does not run on 'cuda': choose cpu"):
        load(full, device="cuda")


def test_an_engine_of_another_checkpoint_is_refused(full, tmp_path_factory):
    other = sample(tmp_path_factory, "minimal")

    with pytest.raises(EngineMismatch, match=r"was built from model .*the checkpoint is"):
        load(replace(full, checkpoint=other.checkpoint))


def test_a_call_beyond_the_limits_is_refused_before_the_graph_sees_it(full):
    engine = load(full)
    queries = engine.encode_queries([[2, 3]])
    many = np.zeros(MAX_PAIRS + 1, np.int32)

    with pytest.raises(LimitExceeded, match="49 pairs"):
        engine.score_pairs(queries, many, many)
    with pytest.raises(LimitExceeded, match="a text of 64 tokens"):
        engine.encode_queries([[2] * 64])


def test_a_graph_that_was_cut_off_is_refused(full, tmp_path):
    directory = copy_of(full, tmp_path)
    path = directory / "pair.onnx"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(EngineMismatch, match=r"pair\.onnx has .* bytes"):
        load(full, directory)


def test_a_graph_that_onnx_runtime_cannot_read_is_a_mismatch(full, tmp_path):
    directory = copy_of(full, tmp_path)
    path = directory / "query.onnx"
    path.write_bytes(b"no graph at all")
    manifest = read_manifest(directory)
    part = GraphFiles(onnx=digest_file(path), profiles=manifest.graphs["query"].profiles)
    write_manifest(directory, manifest.model_copy(update={"graphs": {**manifest.graphs, "query": part}}))

    with pytest.raises(EngineMismatch, match=r"(?s)cannot open .*query\.onnx.*trt\.build"):
        load(full, directory)


def test_the_error_for_a_missing_engine_directory_names_the_build_command(full):
    with pytest.raises(EngineUnavailable, match=r"python -m trt\.build"):
        load_engine(
            "onnx",
            full.checkpoint,
            storage="int8",
            num_slots=1,
            max_pairs=1,
            max_images=1,
            num_threads=None,
            device="cpu",
        )


def test_without_onnx_runtime_the_error_says_what_to_install(full, monkeypatch):
    def missing(package, extra):
        raise PackageMissing(f"install {package} with the extra {extra!r}")

    monkeypatch.setattr(onnx_engine, "require_package", missing)

    with pytest.raises(EngineUnavailable, match="install onnxruntime with the extra 'build'"):
        load(full)


def test_a_failure_of_the_runtime_ends_the_process(full):
    engine = load(full)
    engine._sessions["image"] = engine._sessions["query"]

    with pytest.raises(EngineBroken, match="ONNX Runtime failed in the image graph"):
        engine.encode_images(np.zeros((1, 3, 64, 64), np.uint8))


def test_the_engine_digest_is_of_the_graphs_and_not_of_where_they_lie(full, tmp_path):
    elsewhere = shutil.copytree(full.engine, tmp_path / "elsewhere")

    manifest = read_manifest(full.engine)
    limits = {"num_slots": 0, "max_pairs": 1, "max_images": 1, "num_threads": 1}
    assert OnnxEngine(elsewhere, manifest, **limits).info == OnnxEngine(full.engine, manifest, **limits).info


def bfloat16_sum(weight):
    """x + weight in bfloat16, between casts."""
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["x"], ["half"], to=TensorProto.BFLOAT16),
                helper.make_node("Add", ["half", "weight"], ["sum"]),
                helper.make_node("Transpose", ["sum"], ["turned"]),
                helper.make_node("Cast", ["turned"], ["y"], to=TensorProto.FLOAT),
            ],
            "sum",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
            [numpy_helper.from_array(np.array([weight], np.float32).astype(TO_BFLOAT16), "weight")],
            value_info=[
                helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n"]) for name in ("half", "sum", "turned")
            ],
        ),
        opset_imports=[helper.make_opsetid("", 22)],
        ir_version=10,
    )


TO_BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


def test_a_bfloat16_graph_is_rounded_after_every_step():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    model = bfloat16_sum(0.3)

    twin = round_to_bfloat16(model)

    assert has_bfloat16(model)
    assert not {each.data_type for each in twin.graph.initializer} & {TensorProto.BFLOAT16}
    onnx.checker.check_model(twin, full_check=True)
    session = onnxruntime.InferenceSession(twin.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(values).bfloat16() + torch.tensor(0.3).bfloat16()
    np.testing.assert_array_equal(session.run(None, {"x": values})[0], expected.float().numpy())

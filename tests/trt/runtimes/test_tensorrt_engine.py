"""The TensorRT engine around its plans, on a recorded GPU that defers work as long as a GPU may.

The contract that it shares with every engine is in `test_engines`.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from edje.init import write_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint
from protocols.quantize import quantize
from recorded_engine import MAX_QUERIES, open_recorded, recorded_modules, write_engine
from recording_cuda import Gpu
from recording_tensorrt import plan_of
from trt.contract import EngineBroken, EngineMismatch, EngineUnavailable
from trt.graphs import graphs_of
from trt.load import load_engine, open_tensorrt
from trt.manifest import BuiltOn, digest_file
from trt.runtimes.torch_device import TorchDevice
from trt.runtimes.torch_engine import TorchEngine
from trt.slab.layout import STORAGES, SlotLayout
from trt.slab.torch_slab import SharedSlab

SIZES = {"num_slots": 24, "max_pairs": 48, "max_images": 12}
#: Texts of every length bucket (8, 32, 63), and more than one run of the query graph takes.
TEXTS = [[2, *range(30, 30 + length), 3] for length in (3, 40, 1, 10, 61, 4, 3, 20, 2, 2, 5, 6)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    write_untrained(VARIANTS["tiny"], folder / "tiny", seed=1)
    return folder


@pytest.fixture
def checkpoint(checkpoints):
    return checkpoints / "tiny"


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def engine(checkpoint, gpu, tmp_path):
    return filled(open_recorded(checkpoint, tmp_path, "int8", gpu, device="cuda", **SIZES))


def filled(engine):
    """With an image of its own in each slot."""
    info = engine.info
    tokens = np.random.default_rng(0).normal(size=(24, info.num_visual_tokens, info.token_dim)).astype(np.float32)
    rows_tokens, rows_scales, rows = engine.slab.stage(range(24))
    for row, image in zip(rows, tokens, strict=True):
        values, scales = quantize(info.storage, image)
        rows_tokens[row], rows_scales[row] = np.frombuffer(values, np.uint8), np.frombuffer(scales, np.uint8)
    engine.slab.publish(range(24), rows)
    return engine


def numbers(*values):
    return np.array(values, np.int32)


def scored(engine):
    """48 pairs of every text and many slots, in no order."""
    query, slot = np.random.default_rng(1).integers(0, (len(TEXTS), 24), (48, 2), dtype=np.int32).T
    return engine.score_pairs(engine.encode_queries(TEXTS), query, slot)


def torch_engine(checkpoint, storage):
    loaded = load_checkpoint(checkpoint)
    layout = SlotLayout(storage, loaded.config.adapter.num_tokens, loaded.config.joint.dim)
    sizes = {"max_pairs": 48, "max_images": 12, "device": TorchDevice(torch.device("cpu")), "dtype": torch.float32}
    return filled(TorchEngine(loaded, slab=SharedSlab(layout, 24), **sizes))


@pytest.mark.parametrize("storage", STORAGES)
def test_logits_are_those_of_the_torch_engine(checkpoint, tmp_path, storage):
    engine = filled(open_recorded(checkpoint, tmp_path, storage, device="cuda", **SIZES))

    assert len(TEXTS) > MAX_QUERIES
    np.testing.assert_allclose(scored(engine), scored(torch_engine(checkpoint, storage)), atol=1e-5)


def test_images_in_several_runs_are_those_of_the_torch_engine(checkpoint, tmp_path):
    write = {"num_slots": 0, "max_pairs": 1, "max_images": 4}
    engine = open_recorded(checkpoint, tmp_path, "int8", device="cuda", **write)
    engine.info = replace(engine.info, max_images=12)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 3, 64, 64), dtype=np.uint8)

    for found, expected in zip(
        engine.encode_images(pixels), torch_engine(checkpoint, "int8").encode_images(pixels), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_after_warming_up_everything_is_replayed(engine, gpu):
    engine.warm_up()
    num_runs = gpu.calls.count("execute_async_v3")
    num_contexts = gpu.calls.count("create_execution_context")

    scored(engine)
    engine.encode_images(np.zeros((5, 3, 64, 64), np.uint8))

    assert num_runs == 2 * num_contexts  # once to warm up, once to capture
    assert gpu.calls.count("execute_async_v3") == num_runs
    assert engine.graph_counts().uncaptured == 0


def test_each_size_has_a_context_of_the_narrowest_profile(engine, gpu):
    before = len(gpu.calls)

    engine.score_pairs(engine.encode_queries([TEXTS[0]]), numbers(0), numbers(0))

    chosen = [call for call in gpu.calls[before:] if call.startswith("set_optimization_profile")]
    assert chosen == ["set_optimization_profile_async 0"] * 2


def test_kept_queries_are_not_overwritten_by_later_calls(engine):
    first, second = engine.encode_queries([TEXTS[0]]), engine.encode_queries([TEXTS[1], TEXTS[2]])
    expected = engine.score_pairs(engine.encode_queries([TEXTS[0]]), numbers(0), numbers(5))

    engine.score_pairs(second, numbers(1, 0), numbers(3, 4))

    np.testing.assert_array_equal(engine.score_pairs(first, numbers(0), numbers(5)), expected)


def test_copy_times_are_those_of_the_last_call(engine):
    scored(engine)

    copies = engine.last_copies()

    num_runs = 4  # three length buckets, of which one has more texts than the query graph takes at once
    assert copies.to_device_s == pytest.approx(num_runs * 0.25e-3)
    assert copies.to_host_s == pytest.approx(num_runs * 0.25e-3)


def test_calls_may_come_from_any_thread_and_leave_nothing_on_it(engine, gpu):
    expected = scored(engine)

    with ThreadPoolExecutor(1) as other:
        found = other.submit(scored, engine).result()
        left = other.submit(lambda: getattr(gpu.pushed, "contexts", [])).result()

    np.testing.assert_array_equal(found, expected)
    assert left == gpu.pushed.contexts == []


def test_fixed_buckets_run_every_call_at_one_size_for_its_length(checkpoint, tmp_path):
    gpu = Gpu()
    engine = filled(open_recorded(checkpoint, tmp_path, "int8", gpu, device="cuda", fixed_buckets=True, **SIZES))
    together = scored(engine)
    num_contexts = gpu.calls.count("create_execution_context")
    query, slot = np.random.default_rng(1).integers(0, (len(TEXTS), 24), (48, 2), dtype=np.int32).T

    alone = [
        engine.score_pairs(engine.encode_queries([TEXTS[query[pair]]]), numbers(0), slot[pair : pair + 1])[0]
        for pair in range(0, 48, 8)
    ]

    np.testing.assert_allclose(alone, together[::8], atol=1e-6)
    assert (
        engine.info.engine_digest
        != open_recorded(checkpoint, tmp_path, "int8", device="cuda", **SIZES).info.engine_digest
    )
    assert gpu.calls.count("create_execution_context") == num_contexts == 2 * 3  # query and pair, for three lengths


def test_an_engine_without_cuda_graphs_scores_the_same_and_logs_the_reason(checkpoint, tmp_path, gpu, caplog):
    expected = scored(filled(open_recorded(checkpoint, tmp_path, "int8", device="cuda", **SIZES)))
    gpu.faults["no capture"] = True

    with caplog.at_level(logging.WARNING):
        engine = filled(open_recorded(checkpoint, tmp_path, "int8", gpu, device="cuda", **SIZES))
        found = scored(engine)

    np.testing.assert_array_equal(found, expected)
    assert engine.graph_counts().uncaptured == gpu.calls.count("create_execution_context")
    assert "pair at 6 queries, 63 text tokens, 9 pairs runs without a CUDA graph" in caplog.text


@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_plans_are_enqueued_if_any_step_of_a_capture_fails(engine, gpu, call):
    gpu.faults[call] = 900

    assert np.isfinite(scored(engine)).all()
    assert engine.graph_counts().uncaptured > 0


def test_a_run_that_tensorrt_refuses_is_broken_with_its_reason(engine, gpu):
    gpu.faults["no enqueue"] = True

    with pytest.raises(EngineBroken, match="illegal memory access"):
        scored(engine)


@pytest.mark.parametrize("fault", ["no context", "no shape"])
def test_a_context_that_cannot_be_made_is_broken(engine, gpu, fault):
    gpu.faults[fault] = True

    with pytest.raises(EngineBroken, match="TensorRT"):
        scored(engine)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("memcpy_htod_async", "LogicError"),
        ("memcpy_dtoh_async", "LaunchError"),
        ("DeviceMemoryPool.allocate", "MemoryError"),
        ("Stream.synchronize", "LaunchError"),
        ("launch", "LogicError"),
    ],
)
def test_a_device_that_fails_in_a_call_means_the_process_must_end(engine, gpu, call, error):
    gpu.faults[call] = getattr(gpu.errors, error)("an error that stays")

    with pytest.raises(EngineBroken, match="an error that stays"):
        scored(engine)


def test_a_graph_that_cannot_be_launched_is_broken(engine, gpu):
    engine.warm_up()
    gpu.faults["cuGraphLaunch"] = 900

    with pytest.raises(EngineBroken, match="replay"):
        scored(engine)


def open_again(checkpoint, directory, gpu, manifest):
    with recorded_modules(gpu, checkpoint):
        return open_tensorrt(directory, manifest, device="cuda", **SIZES)


def written(checkpoint, directory, **changes):
    return write_engine(checkpoint, directory, "int8", max_pairs=48, max_images=12, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensorrt_version": "11.3.0.1"}, r"TensorRT 11\.3\.0\.1"),
        ({"gpu": "NVIDIA L4", "compute_capability": (8, 9)}, "NVIDIA L4"),
    ],
    ids=["version", "gpu"],
)
def test_plans_of_another_place_are_refused_with_the_command_that_rebuilds_them(
    checkpoint, gpu, tmp_path, changes, reason
):
    built = {"tensorrt_version": "11.4.0.106", "gpu": gpu.name, "compute_capability": (9, 0)} | changes
    manifest = written(checkpoint, tmp_path, built_on=BuiltOn(**built))

    with pytest.raises(EngineMismatch, match=rf"{reason}.*python -m trt\.build"):
        open_again(checkpoint, tmp_path, gpu, manifest)
    assert "deserialize_cuda_engine" not in gpu.calls


def test_graphs_without_plans_are_refused_with_the_command_that_builds_them(checkpoint, gpu, tmp_path):
    manifest = written(checkpoint, tmp_path)
    graphs = manifest.graphs | {"pair": manifest.graphs["pair"].model_copy(update={"plan": None})}

    with pytest.raises(EngineMismatch, match=r"the pair graph has no plan.*python -m trt\.build"):
        open_again(checkpoint, tmp_path, gpu, manifest.model_copy(update={"graphs": graphs}))


def test_a_truncated_plan_is_refused_before_tensorrt_sees_it(checkpoint, gpu, tmp_path):
    manifest = written(checkpoint, tmp_path)
    plan = tmp_path / "pair.plan"
    plan.write_bytes(plan.read_bytes()[:-7])

    with pytest.raises(EngineMismatch, match="copied incompletely"):
        open_again(checkpoint, tmp_path, gpu, manifest)
    assert "deserialize_cuda_engine" not in gpu.calls


def with_pair_plan(manifest, directory, content):
    (directory / "pair.plan").write_bytes(content)
    part = manifest.graphs["pair"].model_copy(update={"plan": digest_file(directory / "pair.plan")})
    return manifest.model_copy(update={"graphs": manifest.graphs | {"pair": part}})


def test_a_plan_that_tensorrt_cannot_read_is_refused_with_its_reason(checkpoint, gpu, tmp_path):
    manifest = with_pair_plan(written(checkpoint, tmp_path), tmp_path, b"no plan of this version")

    with pytest.raises(EngineMismatch, match="magic tag does not match"):
        open_again(checkpoint, tmp_path, gpu, manifest)


def test_a_plan_with_other_tensors_is_refused(checkpoint, gpu, tmp_path):
    specs = graphs_of(VARIANTS["tiny"], "fp16", "fp32")
    manifest = with_pair_plan(written(checkpoint, tmp_path), tmp_path, plan_of(specs["pair"], "fp16"))

    with pytest.raises(EngineMismatch, match=r"tokens HALF.*tokens UINT8"):
        open_again(checkpoint, tmp_path, gpu, manifest)


def test_too_many_slots_for_the_device_are_named_with_a_remedy(checkpoint, tmp_path):
    gpu = Gpu(memory_bytes=20_000_000)

    with pytest.raises(EngineUnavailable, match="ask for fewer"):
        open_recorded(checkpoint, tmp_path, "int8", gpu, num_slots=100_000, max_pairs=4, max_images=1, device="cuda")


@pytest.mark.parametrize(
    ("device", "remedy"),
    [("cpu", "choose cuda"), ("cuda:x", "choose cuda"), ("cuda:", "choose cuda"), ("cuda:7", "counted from 0")],
)
def test_a_device_that_there_is_not_is_named_with_a_remedy(checkpoint, gpu, tmp_path, device, remedy):
    with pytest.raises(EngineUnavailable, match=remedy):
        open_recorded(checkpoint, tmp_path, "int8", gpu, device=device, **SIZES)


def test_a_machine_without_a_driver_is_named_with_a_remedy(checkpoint, gpu, tmp_path):
    manifest = written(checkpoint, tmp_path)

    with recorded_modules(gpu, checkpoint):
        gpu.faults["init"] = gpu.errors.RuntimeError("cuInit failed: no CUDA-capable device is detected")
        with pytest.raises(EngineUnavailable, match="install the driver"):
            open_tensorrt(tmp_path, manifest, device="cuda", **SIZES)


def test_a_machine_where_tensorrt_does_not_start_is_named_with_a_remedy(checkpoint, gpu, tmp_path):
    gpu.faults["Runtime"] = TypeError("factory function returned nullptr")

    with pytest.raises(EngineUnavailable, match="driver"):
        open_recorded(checkpoint, tmp_path, "int8", gpu, device="cuda", **SIZES)


def test_the_error_without_pycuda_or_tensorrt_names_the_package_to_install(checkpoint, tmp_path):
    written(checkpoint, tmp_path)

    with recorded_modules(Gpu(), checkpoint, without="pycuda.driver"), pytest.raises(EngineUnavailable, match="gpu"):
        load_engine(
            "tensorrt", checkpoint, storage="int8", num_threads=None, device="cuda", engine_directory=tmp_path, **SIZES
        )

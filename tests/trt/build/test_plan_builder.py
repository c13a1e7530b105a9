"""The build of a plan with a recorded builder; `tests/trt/native` checks the calls against the real bindings."""

import importlib

import pytest

from edje.model.variants import VARIANTS
from recorded_engine import recorded_modules
from recording_builder import Recorder, with_builder
from recording_cuda import Gpu
from recording_tensorrt import tensorrt_module
from trt.contract import EngineUnavailable
from trt.graphs import graphs_of
from trt.manifest import BuildOptions
from trt.profiles import profiles_of

DEFAULTS = BuildOptions()
SPEC = graphs_of(VARIANTS["tiny"], "int8", "bf16")["pair"]
PROFILES = profiles_of(max_text_tokens=63, length_buckets=(16,), max_pairs=32, max_queries=32, max_images=1)["pair"]


@pytest.fixture
def recorder():
    return Recorder(plans={"pair": b'{"name": "pair", "storage": "int8", "inputs": [], "outputs": []}'})


@pytest.fixture
def plan(recorder, monkeypatch):
    """`trt.build.plan_builder` over the recorded builder."""
    gpu = Gpu()
    module = with_builder(tensorrt_module(gpu, lambda *_: None), recorder)
    with recorded_modules(gpu):
        monkeypatch.setitem(importlib.sys.modules, "tensorrt", module)
        yield importlib.import_module("trt.build.plan_builder")
        importlib.sys.modules.pop("trt.build.plan_builder", None)


@pytest.fixture
def onnx(tmp_path):
    path = tmp_path / "pair.onnx"
    path.write_bytes(b"a graph")
    return path


@pytest.fixture
def build(plan, onnx):
    def build(options=DEFAULTS, *, timing_cache=None, error_on_cache_miss=False, progress=lambda *_: None):
        builder = plan.PlanBuilder(options, timing_cache=timing_cache, error_on_cache_miss=error_on_cache_miss)
        return builder.build(onnx, SPEC, PROFILES, progress)

    return build


def flags(recorder):
    return {each.name for each in recorder.configs[-1]._flags}


def test_a_plan_comes_with_the_layers_it_runs(build, recorder):
    built = build()

    assert built.plan == recorder.plans["pair"]
    assert "_gemm_mha_v2_myl0_1" in built.layers_json


def test_the_network_is_strongly_typed_and_read_from_its_file(build, recorder, onnx):
    build()

    assert recorder.networks == [{"flags": 1 << 1, "file": str(onnx)}]


def test_float32_stays_float32_and_a_nan_stays_a_nan(build, recorder):
    build()

    assert flags(recorder) == {"STRICT_NANS"}


def test_every_option_reaches_the_builder(build, recorder, plan):
    build(
        BuildOptions(
            optimization_level=5,
            workspace_gb=1.5,
            version_compatible=True,
            hardware_compatibility="ampere_plus",
        )
    )

    config = recorder.configs[-1]
    assert config.builder_optimization_level == 5
    assert list(config._limits.values()) == [3 << 29]
    assert config.profiling_verbosity.name == "DETAILED"
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert flags(recorder) == {"STRICT_NANS", "VERSION_COMPATIBLE"}


def test_every_profile_sets_the_sizes_of_every_input(build, recorder):
    build()

    made = recorder.configs[-1]._profiles
    assert len(made) == len(PROFILES)
    assert made[-1]._shapes == {
        "states": ((1, 17, 64), (8, 63, 64), (32, 63, 64)),
        "text_lengths": ((1,), (8,), (32,)),
        "pair_query": ((9,), (32,), (32,)),
        "tokens": ((9, 1024), (32, 1024), (32, 1024)),
        "scales": ((9, 16), (32, 16), (32, 16)),
    }


def test_progress_is_that_of_the_outermost_phase(build):
    told = []

    build(progress=lambda *step: told.append(step))

    assert told == [("Building", 0, 2), ("Building", 1, 2), ("Building", 2, 2)]


def test_a_timing_cache_is_begun_and_then_used(build, recorder, tmp_path):
    cache = tmp_path / "timings"

    build(timing_cache=cache)
    assert cache.read_bytes() == b"timings+"
    build(timing_cache=cache, error_on_cache_miss=True)

    assert cache.read_bytes() == b"timings++"
    assert flags(recorder) == {"STRICT_NANS", "EDITABLE_TIMING_CACHE", "ERROR_ON_TIMING_CACHE_MISS"}
    assert [path.name for path in tmp_path.iterdir() if "timings" in path.name] == ["timings"]


def test_a_timing_cache_of_another_gpu_is_refused(build, recorder, plan, tmp_path):
    recorder.faults.add("timing cache")

    with pytest.raises(plan.PlanFailed, match=r"timings is not a timing cache of this TensorRT and this GPU"):
        build(timing_cache=tmp_path / "timings")


def test_every_error_of_the_parser_is_reported_with_its_node(build, recorder, plan):
    recorder.parser_errors += [("Foo", "node_7", "no importer"), ("Cast", "node_9", "bad type")]

    with pytest.raises(
        plan.PlanFailed, match=r"pair\.onnx: Foo \(node 'node_7'\): no importer; Cast \(node 'node_9'\)"
    ):
        build()


def test_the_error_for_a_refused_profile_names_it(build, recorder, plan):
    recorder.faults.add("profile")

    with pytest.raises(plan.PlanFailed, match="refuses the profile 'text 1-16, pairs 1-2'"):
        build()


def test_a_failed_build_is_reported_with_tensorrts_reason(build, recorder, plan):
    recorder.faults.add("no plan")

    with pytest.raises(plan.PlanFailed, match="no tactic fits into the workspace"):
        build()


def test_the_error_without_a_gpu_names_onnx_only(build, recorder):
    recorder.faults.add("no gpu")

    with pytest.raises(EngineUnavailable, match=r"finds no GPU.*error: 100.*--onnx-only"):
        build()


def test_a_plan_that_cannot_be_opened_again_is_no_plan(build, recorder, plan):
    recorder.plans["pair"] = b"half a plan"

    with pytest.raises(plan.PlanFailed, match="cannot open the plan that it built"):
        build()

"""The commands `python -m trt.build`, `trt.inspect` and `trt.verify`, on the graphs of the sample engines."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import trt.build.__main__
import trt.build.assemble
import trt.inspect
import trt.verify
from edje.init import write_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint
from engine_directories import FIRST_LIMIT_S, copy_of, sample
from recorded_engine import compute_of, recorded_modules
from recording_builder import Recorder, with_builder
from recording_cuda import Gpu
from recording_tensorrt import plan_of, tensorrt_module
from trt.export.onnx_export import ExportFailed
from trt.export.operators import OperatorUnsupported
from trt.graphs import GRAPH_NAMES, graphs_of
from trt.manifest import check_files, read_manifest, write_manifest
from trt.runtimes.onnx_engine import OnnxEngine

pytestmark = pytest.mark.timeout(FIRST_LIMIT_S)

FEW = ("--verify-texts", "6", "--verify-num-images", "3")
OPTIONS = ("--precision", "fp32", "--max-pairs", "16", "--max-images", "4", "--length-buckets", "8,16,32")


def typed(main, *words):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture
def made(tmp_path_factory):
    return sample(tmp_path_factory, "full")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "engines" / "new"


@pytest.fixture
def build(made, out, monkeypatch):
    """Builds with the sample's graphs, which are those of the sample's checkpoint in any case."""

    def export_graph(name, checkpoint, directory, *, storage, precision):
        assert (storage, precision) == (made.options.storage, made.options.precision)
        return shutil.copy(made.engine / f"{name}.onnx", directory / f"{name}.onnx")

    monkeypatch.setattr(trt.build.assemble, "export_graph", export_graph)

    def build(*words, target=out):
        return typed(trt.build.__main__.main, made.checkpoint, "--out", target, *OPTIONS, *FEW, *words)

    return build


@pytest.fixture
def recorder(made, monkeypatch):
    """A recorded GPU with TensorRT, whose plans compute what the sample's checkpoint computes."""
    config = load_checkpoint(made.checkpoint).config
    specs = graphs_of(config, "int8", "fp32")
    recorder = Recorder(plans={name: plan_of(spec, "int8") for name, spec in specs.items()})
    gpu = Gpu()
    module = with_builder(tensorrt_module(gpu, compute_of(made.checkpoint)), recorder)
    with recorded_modules(gpu):
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        yield recorder


def left_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_checkpoint_becomes_an_engine_directory(build, out, made):
    done = build("--onnx-only")

    assert done.exit_code == 0, done.output
    manifest = read_manifest(out)
    check_files(out, manifest, plans=False)
    assert manifest.model_digest == load_checkpoint(made.checkpoint).digest
    assert manifest.built_on is None
    assert left_in(out) == ["image.onnx", "manifest.json", "pair.onnx", "query.onnx"]
    assert left_in(out.parent) == ["new"]
    [report] = manifest.parity
    assert (report.runtime, report.agreement.top1, report.agreement.tau) == ("onnx", 1.0, 1.0)
    assert report.pairs_of.startswith("drawn scenes")
    assert (out.stat().st_mode & 0o777, (out / "pair.onnx").stat().st_mode & 0o777) == (0o755, 0o644)
    assert "rebuild with: python -m trt.build CHECKPOINT --out DIR --precision fp32 --max-pairs 16" in done.stdout


def test_on_a_gpu_plans_are_built_compared_and_described(build, out, recorder):
    done = build()

    assert done.exit_code == 0, done.output
    manifest = read_manifest(out)
    check_files(out, manifest, plans=True)
    assert [report.runtime for report in manifest.parity] == ["onnx", "tensorrt"]
    assert (manifest.built_on.gpu, manifest.built_on.tensorrt_version) == ("NVIDIA Recorded", "11.4.0.106")
    assert all(digest in done.stdout for digest in manifest.engine_digests().values())
    assert "fused in 1 layers, by their names" in done.stdout
    assert [len(each._profiles) for each in recorder.configs] == [
        len(manifest.graphs[name].profiles) for name in GRAPH_NAMES
    ]


def test_a_build_without_fused_attention_fails_unless_it_is_allowed(build, out, recorder, monkeypatch):
    compiler = importlib.import_module("trt.build.tensorrt_compiler")
    softmax = compiler.read_layers.__globals__["Layer"](Name="softmax_7", LayerType="kgen")
    monkeypatch.setattr(compiler, "read_layers", lambda path: (softmax,))
    init = compiler.TensorRtCompiler.__init__

    def in_half_precision(self, options, **settings):  # the sample is in float32, which is not checked
        init(self, options.model_copy(update={"precision": "bf16"}), **settings)

    monkeypatch.setattr(compiler.TensorRtCompiler, "__init__", in_half_precision)

    refused, allowed = build(), build("--allow-unfused-attention")

    assert (refused.exit_code, allowed.exit_code) == (1, 0)
    assert "the plan of the image graph computes attention in several kernels: NOT FUSED in 1 layers" in refused.stderr
    assert "--allow-unfused-attention" in refused.stderr


def test_plans_that_compute_something_else_are_no_engine(build, out, recorder, monkeypatch):
    class Reversed:
        """The plans' engine, best candidates last."""

        def __init__(self, engine):
            self._engine = engine

        def __getattr__(self, name):
            return getattr(self._engine, name)

        def score_pairs(self, *arguments):
            return -self._engine.score_pairs(*arguments)

    compiler = importlib.import_module("trt.build.tensorrt_compiler")
    load = compiler.TensorRtCompiler.load
    monkeypatch.setattr(compiler.TensorRtCompiler, "load", lambda *arguments: Reversed(load(*arguments)))

    done = build()

    assert done.exit_code == 1
    assert "the tensorrt engine does not agree with the torch engine in float32 on drawn scenes" in done.stderr
    assert "Kendall's tau is -1.0000" in done.stderr
    assert left_in(out.parent) == []


def test_the_former_engine_is_kept_if_a_threshold_is_missed(build, out):
    build("--onnx-only")
    former = read_manifest(out)

    done = build("--onnx-only", "--force", "--verify-max-error", "1e-12")

    assert done.exit_code == 1
    assert "allowed is 1e-12: query" in done.stderr
    assert read_manifest(out) == former
    assert left_in(out.parent) == ["new"]


def test_an_engine_is_replaced_only_by_force(build, out):
    build("--onnx-only")

    refused, forced = build("--onnx-only"), build("--onnx-only", "--force", "--workspace-gb", "2")

    assert (refused.exit_code, forced.exit_code) == (1, 0)
    assert "replace it with --force" in refused.stderr
    assert read_manifest(out).options.workspace_gb == 2.0
    assert left_in(out.parent) == ["new"]


def test_force_does_not_replace_a_directory_that_is_not_an_engine(build, out):
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("the only copy")

    done = build("--onnx-only", "--force")

    assert done.exit_code == 1
    assert "holds no manifest.json: choose another directory" in done.stderr
    assert left_in(out) == ["thesis.txt"]


def test_without_tensorrt_the_error_names_onnx_only_and_what_to_install(build, out):
    with recorded_modules(Gpu(), without="tensorrt"):
        done = build()

    assert done.exit_code == 1
    assert "--onnx-only" in done.stderr
    assert "pip install 'edje-rerank[gpu]'" in done.stderr
    assert left_in(out.parent) == []


def test_without_a_gpu_the_error_comes_before_any_work(build, out, recorder):
    recorder.faults.add("no gpu")

    done = build()

    assert done.exit_code == 1
    assert "finds no GPU to build on" in done.stderr
    assert recorder.networks == []


@pytest.mark.parametrize("error", [ExportFailed("cannot be exported"), OperatorUnsupported("Foo (node 'n')")])
def test_a_model_that_makes_no_graph_leaves_nothing_behind(build, out, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(trt.build.assemble, "export_graph", fail)

    done = build("--onnx-only")

    assert done.exit_code == 1
    assert str(error) in done.stderr
    assert left_in(out.parent) == []


def test_a_full_disk_is_reported_and_no_files_are_left(build, out, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trt.build.assemble, "export_graph", fail)

    done = build("--onnx-only")

    assert done.exit_code == 1
    assert "No space left on device" in done.stderr
    assert left_in(out.parent) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--length-buckets", "8,many"), "length_buckets.1"),
        (("--max-pairs", "0"), "max_pairs"),
        (("--optimization-level", "9"), "optimization_level"),
        (("--verify-top1", "2"), "top1"),
        (("--error-on-timing-cache-miss",), "needs --timing-cache"),
        (("--precision", "int8"), "'fp32', 'fp16', 'bf16'"),
    ],
)
def test_the_error_for_an_invalid_command_names_the_option(build, words, said):
    done = build("--onnx-only", *words)

    assert done.exit_code == 2
    assert said in done.stderr


def test_an_unknown_storage_type_is_reported(build):
    done = build("--onnx-only", "--storage", "int3")

    assert done.exit_code == 1
    assert "choose one of fp16, bf16, int8, int4" in done.stderr


def test_an_invalid_checkpoint_is_reported(tmp_path, out):
    done = typed(trt.build.__main__.main, tmp_path, "--out", out, "--onnx-only")

    assert done.exit_code == 1
    assert "holds no checkpoint" in done.stderr


def test_an_engine_is_described(made):
    done = typed(trt.inspect.main, made.engine)

    assert done.exit_code == 0
    for said in (
        "none: ONNX graphs only",
        "int8, fp32",
        "text 17-32, pairs 13-48",
        "8 queries, 32 text tokens, 48 pairs",
    ):
        assert said in done.stdout


def test_an_engine_whose_files_were_cut_off_is_not_described(made, tmp_path):
    directory = copy_of(made, tmp_path)
    (directory / "pair.onnx").write_bytes(b"")

    done = typed(trt.inspect.main, directory)

    assert done.exit_code == 1
    assert "pair.onnx has 0 bytes" in done.stderr


def verify(*words):
    return typed(trt.verify.main, *words, "--texts", 6, "--num-images", 3)


def test_an_engine_is_held_against_its_checkpoint(made):
    done = verify(f"torch:{made.checkpoint}", made.engine)

    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["agreement"]["tau"] == 1.0
    assert report["pairs_of"].startswith("drawn scenes")


def test_two_engines_are_compared_on_random_pairs_where_there_are_no_words(made, tmp_path):
    done = verify(made.engine, f"onnx:{copy_of(made, tmp_path)}")

    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["agreement"]["max_error"] == 0.0
    assert report["pairs_of"] == "random pictures and texts"


def test_engines_that_rank_otherwise_end_with_1_and_the_place(made, tmp_path_factory, tmp_path):
    other = tmp_path / "other"
    write_untrained(load_checkpoint(made.checkpoint).config, other, seed=99)

    done = verify(f"torch:{other}", made.engine)

    assert done.exit_code == 1
    assert f"the onnx engine does not agree with torch:{other}" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["agreement"]["top1"] < 1


def test_the_error_for_plans_without_tensorrt_names_the_package_to_install(made):
    with recorded_modules(Gpu(), without="tensorrt"):
        done = verify(made.engine, f"tensorrt:{made.engine}")

    assert done.exit_code == 1
    assert "pip install 'edje-rerank[gpu]'" in done.stderr


def test_engines_of_different_stores_or_models_are_not_compared(made, tmp_path):
    int4 = copy_of(made, tmp_path)
    manifest = read_manifest(int4)
    options = manifest.options.model_copy(update={"storage": "int4"})
    write_manifest(int4, manifest.model_copy(update={"options": options}))
    write_untrained(VARIANTS["tiny-late"], tmp_path / "late", seed=1)

    other_storage, other_model = verify(made.engine, int4), verify(f"torch:{tmp_path / 'late'}", made.engine)

    assert (other_storage.exit_code, other_model.exit_code) == (1, 1)
    assert "different storage types (int4, int8)" in other_storage.stderr
    assert "different model configurations" in other_model.stderr


def test_a_logit_that_is_not_finite_fails_a_comparison(made, monkeypatch):
    def broken(self, queries, pair_query, *_):
        return np.full(len(pair_query), np.nan, np.float32)

    monkeypatch.setattr(OnnxEngine, "score_pairs", broken)

    done = verify(f"torch:{made.checkpoint}", made.engine)

    assert done.exit_code == 1
    assert "the engine's logit of query 0 with candidate 0 is not finite" in done.stderr


def test_a_threshold_out_of_range_is_reported(made):
    done = verify(f"torch:{made.checkpoint}", made.engine, "--tau", "7")

    assert done.exit_code == 2
    assert "less than or equal to 1" in done.stderr

"""The manifest of an engine directory, and the reasons for which a directory is refused."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.model.variants import VARIANTS
from trt.contract import EngineMismatch
from trt.graphs import GRAPH_NAMES
from trt.manifest import (
    MANIFEST_FILE,
    BuildOptions,
    BuiltOn,
    GraphFiles,
    Manifest,
    check_files,
    digest_file,
    read_manifest,
    rebuild_command,
    write_manifest,
)
from trt.matching import limit_mismatches, mismatches, refuse
from trt.profiles import profiles_of

H100 = {"gpu": "NVIDIA H100", "compute_capability": (9, 0)}
HERE = {"model_digest": "a" * 16, "tensorrt_version": "11.4.0.106", **H100}


@pytest.fixture
def engine(tmp_path):
    """A directory with files of a few bytes in the place of graphs and plans, and its manifest."""
    profiles = profiles_of(max_text_tokens=63, length_buckets=(16,), max_pairs=8, max_queries=8, max_images=2)
    graphs = {}
    for name in GRAPH_NAMES:
        for kind in ("onnx", "plan"):
            (tmp_path / f"{name}.{kind}").write_text(f"{name} {kind}")
        graphs[name] = GraphFiles(
            onnx=digest_file(tmp_path / f"{name}.onnx"),
            plan=digest_file(tmp_path / f"{name}.plan"),
            profiles=profiles[name],
        )
    manifest = Manifest(
        model_digest="a" * 16,
        model=json.loads(json.dumps(asdict(VARIANTS["tiny"]))),
        options=BuildOptions(max_pairs=8, max_images=2),
        opset=22,
        graphs=graphs,
        built_on=BuiltOn(tensorrt_version="11.4.0.106", **H100),
        versions={"torch": "2.15.0"},
    )
    write_manifest(tmp_path, manifest)
    return tmp_path


@pytest.fixture
def manifest(engine):
    return read_manifest(engine)


def changed(manifest, **options):
    return manifest.model_copy(update={"options": manifest.options.model_copy(update=options)})


def test_a_written_manifest_is_read_back(engine, manifest):
    assert manifest.config == VARIANTS["tiny"]
    check_files(engine, manifest, plans=True)
    check_files(engine, manifest, plans=False)


def test_an_engine_of_this_model_version_and_gpu_is_taken(engine, manifest):
    assert mismatches(manifest, **HERE) == []

    refuse(engine, manifest, [])


def test_a_plan_of_another_gpu_is_refused_with_the_command_that_rebuilds_it(engine, manifest):
    found = mismatches(manifest, **{**HERE, "gpu": "NVIDIA L4", "compute_capability": (8, 9)})

    assert found == [
        "the plans were built for NVIDIA H100 of compute capability 9.0; "
        "this machine has NVIDIA L4 of compute capability 8.9"
    ]
    with pytest.raises(EngineMismatch, match=r"python -m trt\.build CHECKPOINT --out DIR --max-pairs 8 --max-images 2"):
        refuse(engine, manifest, found)


def test_a_plan_of_another_tensorrt_is_refused(manifest):
    [found] = mismatches(manifest, **{**HERE, "tensorrt_version": "11.5.0.1"})

    assert "run only on TensorRT 11.4.0.106, which built them; this machine has 11.5.0.1" in found


@pytest.mark.parametrize(("here", "fits"), [("11.5.0.1", True), ("11.3.0.1", False), ("12.0.0.1", False)])
def test_a_version_compatible_plan_runs_on_later_versions_of_its_major(manifest, here, fits):
    found = mismatches(changed(manifest, version_compatible=True), **{**HERE, "tensorrt_version": here})

    assert (found == []) == fits


@pytest.mark.parametrize(
    ("level", "capability", "fits"),
    [
        ("same_compute_capability", (9, 0), True),
        ("same_compute_capability", (8, 9), False),
        ("ampere_plus", (8, 9), True),
        ("ampere_plus", (7, 5), False),
    ],
)
def test_a_hardware_compatible_plan_runs_on_other_gpus(manifest, level, capability, fits):
    other = {**HERE, "gpu": "another", "compute_capability": capability}

    assert (mismatches(changed(manifest, hardware_compatibility=level), **other) == []) == fits


def test_an_engine_of_another_model_is_refused(manifest):
    [found] = mismatches(manifest, **{**HERE, "model_digest": "b" * 16})

    assert "model aaaaaaaaaaaaaaaa, the checkpoint is bbbbbbbbbbbbbbbb" in found


def test_a_directory_without_plans_is_a_mismatch(manifest):
    assert mismatches(manifest.model_copy(update={"built_on": None}), **HERE) == [
        "the directory holds ONNX graphs only, no plans"
    ]


def test_one_error_lists_every_mismatch(manifest):
    assert len(mismatches(manifest, model_digest="b", tensorrt_version="1.0", gpu="x", compute_capability=(1, 0))) == 3


def test_more_than_the_engine_was_built_for_is_refused(manifest):
    fitting = {"storage": "int8", "max_pairs": 8, "max_images": 2}

    assert limit_mismatches(manifest, **fitting) == []
    assert limit_mismatches(manifest, storage="fp16", max_pairs=9, max_images=3) == [
        "the engine reads int8 tokens, the store holds fp16",
        "the engine takes at most 8 pairs in one call, the settings ask for 9",
        "the engine takes at most 2 images in one call, the settings ask for 3",
    ]


@pytest.mark.parametrize("plans", [True, False])
def test_a_file_that_was_cut_off_is_found_by_its_size(engine, manifest, plans):
    path = engine / ("pair.plan" if plans else "pair.onnx")
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(EngineMismatch, match=r"8 bytes, the manifest says 9.*trt\.build"):
        check_files(engine, manifest, plans=plans)


def test_a_file_with_other_content_is_found_by_its_digest(engine, manifest):
    (engine / "query.plan").write_text("QUERY plan")

    with pytest.raises(EngineMismatch, match=r"query\.plan differs from the file"):
        check_files(engine, manifest, plans=True)


def test_the_error_for_a_missing_plan_names_it(engine, manifest):
    (engine / "image.plan").unlink()

    with pytest.raises(EngineMismatch, match=r"image\.plan cannot be read \(No such file"):
        check_files(engine, manifest, plans=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is incomplete or damaged"),
        ("{", "is incomplete or damaged"),
        ("[]", "has format None"),
        ('{"format_version": 2}', "has format 2, this program reads 1"),
        ('{"format_version": 1}', "is not a valid manifest"),
        ("\x00\xff", "is incomplete or damaged"),
    ],
)
def test_an_invalid_manifest_is_refused_with_a_remedy(tmp_path, text, said):
    (tmp_path / MANIFEST_FILE).write_text(text, encoding="latin-1")

    with pytest.raises(EngineMismatch, match=rf"{said}.*trt\.build"):
        read_manifest(tmp_path)


def test_a_directory_without_a_manifest_is_no_engine(tmp_path):
    with pytest.raises(EngineMismatch, match=r"holds no engine.*trt\.build"):
        read_manifest(tmp_path)


def test_a_huge_manifest_is_not_read(tmp_path):
    with (tmp_path / MANIFEST_FILE).open("wb") as file:
        file.truncate(20_000_000)

    with pytest.raises(EngineMismatch, match="larger than any manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../pair.onnx", "/etc/passwd", "a/b", ".hidden", ""])
def test_a_manifest_whose_files_lie_elsewhere_is_refused(engine, name):
    raw = json.loads((engine / MANIFEST_FILE).read_text())
    raw["graphs"]["pair"]["onnx"]["name"] = name
    (engine / MANIFEST_FILE).write_text(json.dumps(raw))

    with pytest.raises(EngineMismatch, match=r"graphs\.pair\.onnx\.name"):
        read_manifest(engine)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda raw: raw["graphs"].pop("pair"), "an engine has the graphs image, query, pair"),
        (lambda raw: raw["graphs"]["pair"].update(plan=None), "all graphs have plans together with built_on"),
        (lambda raw: raw.update(built_on=None), "all graphs have plans together with built_on"),
        (lambda raw: raw["graphs"]["image"].update(profiles=[]), "profiles of the image graph"),
        (
            lambda raw: raw["graphs"]["query"].update(profiles=raw["graphs"]["image"]["profiles"]),
            "profiles of the query graph must have ranges for queries, text_tokens",
        ),
    ],
    ids=["graph", "one plan", "where", "no profile", "other profiles"],
)
def test_a_manifest_that_lacks_a_part_is_refused(engine, break_it, said):
    raw = json.loads((engine / MANIFEST_FILE).read_text())
    break_it(raw)
    (engine / MANIFEST_FILE).write_text(json.dumps(raw))

    with pytest.raises(EngineMismatch, match=said):
        read_manifest(engine)


def test_a_model_that_this_program_does_not_know_is_a_mismatch(manifest):
    unknown = manifest.model_copy(update={"model": {**manifest.model, "invented": 1}})

    with pytest.raises(EngineMismatch, match="does not know"):
        _ = unknown.config


def test_the_engine_digest_changes_with_everything_that_can_change_a_score(manifest):
    pair = manifest.graphs["pair"]
    other_plan = pair.model_copy(update={"plan": pair.plan.model_copy(update={"sha256": "0" * 64})})
    variants = [
        manifest,
        manifest.model_copy(update={"model_digest": "b" * 16}),
        changed(manifest, storage="fp16"),
        changed(manifest, precision="fp16"),
        manifest.model_copy(update={"built_on": None}),
        manifest.model_copy(update={"built_on": manifest.built_on.model_copy(update={"gpu": "another"})}),
        manifest.model_copy(update={"graphs": {**manifest.graphs, "pair": other_plan}}),
    ]

    assert len({each.engine_digest("tensorrt") for each in variants}) == len(variants)
    assert len(set(manifest.engine_digests().values())) == 3
    assert changed(manifest, workspace_gb=1.0).engine_digests() == manifest.engine_digests()
    other_runtime = manifest.model_copy(update={"versions": {"onnxruntime": "2.0"}})
    assert other_runtime.engine_digest("onnx") != manifest.engine_digest("onnx")
    assert other_runtime.engine_digest("tensorrt") == manifest.engine_digest("tensorrt")


options = st.builds(
    BuildOptions,
    storage=st.sampled_from(["int8", "fp16"]),
    precision=st.sampled_from(["fp32", "bf16"]),
    max_pairs=st.integers(1, 999),
    length_buckets=st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple),
    workspace_gb=st.floats(0.5, 64),
    version_compatible=st.booleans(),
    hardware_compatibility=st.sampled_from(["none", "ampere_plus"]),
)


@given(options=options)
def test_a_command_line_contains_only_the_options_that_differ_from_the_defaults(options):
    spoken = options.as_arguments()

    flags = {each.removeprefix("--").replace("-", "_") for each in spoken if each.startswith("--")}
    assert flags == {
        name for name in BuildOptions.model_fields if getattr(options, name) != getattr(BuildOptions(), name)
    }


def test_the_rebuild_command_can_be_typed(manifest):
    spoken = rebuild_command(changed(manifest, length_buckets=(8, 16), storage="int4"))

    assert spoken == (
        "python -m trt.build CHECKPOINT --out DIR --storage int4 --max-pairs 8 --max-images 2 --length-buckets 8,16"
    )

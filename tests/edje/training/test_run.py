"""Whole runs of a tiny recipe: their results, how they stop, and that they continue bit for bit."""

from __future__ import annotations

import shutil
import signal

import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner

from edje.data.scenes.dataset import write_scenes
from edje.first_stage.load import load_first_stage
from edje.model.weights import load_checkpoint
from edje.recipe import RecipeError
from edje.train import main
from edje.training import loop as loop_module
from edje.training import run as run_module
from edje.training.build import build_model
from edje.training.devices import Devices
from training_harness import (
    RANK_STEPS,
    SEE_STEPS,
    TINY,
    RecordedConsole,
    at_batch,
    content,
    last_step,
    metrics,
    run_processes,
    tiny_recipe,
    train,
)

HEAD = TINY[: TINY.index("[[phase]]")]
CPU = Devices(torch.device("cpu"))
NUM_STEPS = SEE_STEPS + RANK_STEPS
#: One step from the finished run's weights, on losses that are means over samples.
ONE_STEP = """
[[phase]]
name = "one"
epochs = 0.01
batch_size = 8
learning_rate = 1e-3
precision = "fp32"
clip_norm = 1e9
train = {adapter = 1, text = 1, meeting = 1}
losses = {itm = 1, text_recovery = 1}
negatives = {source = "corpus", per_sample = 2, top_k = 2}
"""
#: One step of both contrastive losses, which compare each sample with all others.
CONTRAST = """
[[phase]]
name = "contrast"
epochs = 0.01
batch_size = 8
learning_rate = 1e-3
precision = "fp32"
clip_norm = 1e9
train = {adapter = 1, text = 1, visual = 1, meeting = 1, first_stage = 1}
losses = {late_interaction = 1, first_stage = 1}
"""
STUDENT = """
[[phase]]
name = "distil"
epochs = 0.4
batch_size = 16
learning_rate = 1e-3
precision = "fp32"
train = {adapter = 1, visual = 1, meeting = 1}
losses = {itm = 1, distillation = 1, mlm = 0.1, text_recovery = 0.1, late_interaction = 0.1}
negatives = {source = "corpus", per_sample = 1, top_k = 3}
teacher = "TEACHER"
crop_views = 1
mirror = false
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("training")
    train(tiny_recipe(folder), folder / "out")
    return folder / "out"


@pytest.fixture
def recipe(finished, tmp_path):
    """The recipe of that run."""
    return tiny_recipe(tmp_path)


@pytest.fixture
def out(finished, tmp_path):
    """A folder for another run over the same features."""
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "features").symlink_to(finished.parent / "features")
    return folder / "out"


@pytest.fixture
def edje_train(tmp_path, out):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)

    def run(*options, path=None):
        if path is None:
            path = tmp_path / "tiny.toml"
            path.write_text(TINY)
        words = [path, "--out", out, "--features", out.parent / "features", "--device", "cpu", *options]
        return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "400"})

    return run


def start_from(finished, *parts):
    """The line of a recipe that starts from parts of the finished run."""
    return f'start = {{checkpoint = "{finished}/checkpoint", parts = {list(parts)}}}\n'


def one_step_after(finished):
    return start_from(finished, "vision", "adapter", "text", "meeting", "first_stage") + HEAD + ONE_STEP


def student_of(finished, head):
    return start_from(finished, "vision", "first_stage") + head + STUDENT.replace("TEACHER", f"{finished}/checkpoint")


def assert_same(out, finished):
    assert content(out / "checkpoint") == content(finished / "checkpoint")
    assert without_timings(metrics(out)) == without_timings(metrics(finished))


def without_timings(lines):
    return [
        {name: line[name] for name in line if name not in ("samples_per_second", "data_wait_share")} for line in lines
    ]


# Results


def test_a_run_leaves_a_checkpoint_with_its_first_stage(finished):
    loaded = load_checkpoint(finished / "checkpoint")
    first_stage = load_first_stage(finished / "checkpoint")

    assert loaded.config.trained
    assert first_stage.dim == 8
    assert loaded.config.calibration is not None
    assert all(each.isfinite().all() for each in loaded.model.state_dict().values())


def test_metrics_contain_the_losses_of_steps_and_the_recall_after_each_phase(finished):
    logged = metrics(finished)

    assert [(line["step"], line["phase"]) for line in logged] == [
        (0, "see"),
        (SEE_STEPS - 1, "see"),
        (SEE_STEPS - 1, "see"),
        (SEE_STEPS, "rank"),
        (NUM_STEPS - 1, "rank"),
        (NUM_STEPS - 1, "rank"),
    ]
    assert {"mlm", "first_stage", "gradient_norm", "learning_rate"} <= logged[0].keys()
    assert {"itm", "mlm", "text_recovery"} <= logged[3].keys()
    assert {"first_stage_r1", "reranked_r1"} <= logged[5].keys()
    assert any(path.name.startswith("events") for path in (finished / "tensorboard").iterdir())


def test_parts_that_a_phase_does_not_train_stay_the_same_bit_for_bit(finished):
    names = sorted(path.name for path in (finished / "state").iterdir())
    assert names == [f"{SEE_STEPS:08d}", f"{NUM_STEPS:08d}"]
    before, after = (safetensors.torch.load_file(finished / "state" / name / "tensors.safetensors") for name in names)

    changed = {name.removeprefix("module.") for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in changed if name.startswith(("model.vision.", "first_stage."))}
    for part in (
        "model.adapter.fc1.weight",
        "model.joint.words.weight",
        "model.joint.head.out.bias",
        "heads.word_bias",
    ):
        assert part in changed


def test_a_small_set_is_learned(finished, out, tmp_path):
    recipe = tiny_recipe(tmp_path, "phase.0.epochs=8", 'skip=["rank"]')

    train(recipe, out)

    first, last = metrics(out)[0], metrics(out)[-2]
    assert last["first_stage"] < 0.8 * first["first_stage"]
    assert last["mlm"] < 0.9 * first["mlm"]


def test_position_vectors_and_a_decoder_that_starts_at_them_are_trained_and_saved(out, tmp_path):
    changes = ('adapter.kind="decoder"', "adapter.num_tokens=3", "adapter.places=true", 'skip=["rank"]')
    recipe = tiny_recipe(tmp_path, *changes)

    adapter = load_checkpoint(train(recipe, out)).model.adapter

    drawn = build_model(recipe, ["one caption"]).model.adapter
    for ours, before in ((adapter.places.table.weight, drawn.places.table.weight), (adapter.query, drawn.query)):
        assert ours.shape == before.shape
        assert not torch.equal(ours, before)
    assert (adapter.query[0] * adapter.places.evenly_spaced(3)).sum(dim=1).min() > 0  # close to their initial values


@pytest.mark.parametrize("kind", ["late", "minimal", "maxsim"])
def test_a_student_of_any_kind_learns_from_a_local_teacher(finished, out, tmp_path, kind, monkeypatch):
    head = HEAD.replace('kind = "full"', f'kind = "{kind}"\ntext_layers = 1\nmatch_dim = 8')
    num_layers = "num_layers = 0" if kind == "maxsim" else "num_layers = 1\nvisual_layers = 1"
    head = head.replace("num_layers = 2", num_layers)
    head = head.replace('kind = "local"\nnum_tokens = 4', 'kind = "compression"\nnum_tokens = 2')
    recipe = tiny_recipe(tmp_path, text=student_of(finished, head))
    if kind == "late":  # also in bf16, even where it is slow
        recipe = recipe.model_copy(update={"phase": (recipe.phase[0].model_copy(update={"precision": "bf16"}),)})
        monkeypatch.setattr(loop_module, "computes_bf16", lambda device: True)

    checkpoint = train(recipe, out)

    model = load_checkpoint(checkpoint).model.state_dict()
    teacher = load_checkpoint(finished / "checkpoint").model.state_dict()
    assert all(torch.equal(each, teacher[name]) for name, each in model.items() if name.startswith("vision."))
    losses = {"itm", "distillation", "mlm", "text_recovery", "late_interaction"}
    assert losses <= metrics(out)[0].keys()
    assert "late_interaction_r1" in metrics(out)[-1]


# Resuming


def test_a_run_with_a_damaged_state_resumes_from_the_one_before_bit_for_bit(finished, recipe, out):
    def power_cut():
        raise RuntimeError("power cut")

    with at_batch(SEE_STEPS - 1, power_cut), pytest.raises(RuntimeError, match="power cut"):
        train(recipe, out, save_every=1)
    newest = max((out / "state").iterdir())
    (newest / "tensors.safetensors").write_bytes((newest / "tensors.safetensors").read_bytes()[:-100])
    output = RecordedConsole()

    train(recipe, out, output=output)

    assert f"{newest} was changed or truncated and is skipped" in output.text
    assert_same(out, finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_after_its_step_and_the_command_resumes_from_there(edje_train, finished, out, number):
    step = SEE_STEPS + 2 if number == signal.SIGTERM else 1
    with at_batch(step, lambda: signal.raise_signal(number)):
        stopped = edje_train()

    assert stopped.exit_code == 130
    assert "The same command resumes" in stopped.stderr
    assert max(path.name for path in (out / "state").iterdir()) == f"{step + 1:08d}"

    done = edje_train()

    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out / "checkpoint")
    assert_same(out, finished)


def test_an_interrupt_within_the_validation_loses_neither_steps_nor_lines(finished, recipe, out, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out)
    monkeypatch.undo()
    steps = []
    with at_batch(0, lambda: steps.append("taken")):
        train(recipe, out)

    assert steps == ["taken"]  # the first batch of the second phase
    assert_same(out, finished)


def test_a_run_that_stopped_before_its_checkpoint_writes_the_same_one(finished, recipe, out):
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoint" / "first_stage")

    with at_batch(0, pytest.fail):
        train(recipe, out)

    assert_same(out, finished)


def test_a_complete_run_is_not_changed(edje_train, finished, out, monkeypatch):
    shutil.copytree(finished, out)
    monkeypatch.setattr(run_module, "Run", pytest.fail)

    done = edje_train()

    assert done.exit_code == 0, done.output
    assert "Nothing is left to train" in done.stderr
    assert done.stdout.strip() == str(out / "checkpoint")


def test_float32_replaces_bf16_on_a_slow_device_with_a_log_line(finished, out, tmp_path, monkeypatch):
    for module in (run_module, loop_module):
        monkeypatch.setattr(module, "computes_bf16", lambda device: False)
    output = RecordedConsole()
    changes = ['phase.0.precision="bf16"', 'phase.1.precision="bf16"']

    train(tiny_recipe(tmp_path, *changes), out, output=output)

    assert output.text.count("see: cpu has no fast bf16; float32 is used instead") == 1
    assert_same(out, finished)


def test_two_half_batches_give_the_gradient_of_the_whole(finished, out, tmp_path):
    text = one_step_after(finished)

    whole = last_step(tiny_recipe(tmp_path, text=text), out, CPU)
    halves = last_step(tiny_recipe(tmp_path, "phase.0.batch_size=4", "phase.0.accumulate=2", text=text), out, CPU)

    assert_close(halves, whole)


def assert_close(ours, theirs):
    gradients = {name for name in theirs if name.startswith("gradient ")}
    assert {name for name in ours if name.startswith("gradient ")} == gradients
    assert gradients
    for name in gradients:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4)


# Several devices


@pytest.mark.timeout(600)  # two processes import torch
@pytest.mark.parametrize("losses", ["matching", "contrast"])
def test_two_devices_have_the_gradients_of_one(finished, out, tmp_path, losses):
    text = one_step_after(finished).replace('"corpus"', '"batch"')
    if losses == "contrast":
        apart = HEAD.replace('kind = "full"', 'kind = "late"\ntext_layers = 1\nvisual_layers = 1\nmatch_dim = 8')
        text = start_from(finished, "vision", "first_stage") + apart + CONTRAST
    alone = last_step(tiny_recipe(tmp_path, text=text), out, CPU)
    tiny_recipe(tmp_path, text=text.replace("batch_size = 8", "batch_size = 4"))
    out.mkdir(exist_ok=True)

    run_processes(2, "last_step", tmp_path / "tiny.toml", out)

    one, other = (safetensors.torch.load_file(out / f"rank{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(each, other[name]) for name, each in one.items())
    assert_close(one, alone)
    assert load_checkpoint(out / "checkpoint").config.trained


# Invalid input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "k=four"], "k: Input should be a valid integer"),
        (["--set", "kk=4"], "kk: Extra inputs are not permitted"),
        (["--device", "abacus"], "DeviceError: the device 'abacus' is unavailable"),
        (
            ["--set", "phase.0.batch_size=1000"],
            "100 captions do not fill a step of 1000 (1000 on each of 1 devices, accumulate 1)",
        ),
        (
            ["--set", "adapter.num_tokens=5"],
            "do not fit together: adapter.num_tokens is 5: a local adapter has one for each of 4 patches",
        ),
        (
            ["--set", "joint.num_heads=3"],
            "do not fit together: the widths 16 (vision) and 16 (joint) must be multiples",
        ),
        (["--set", 'joint.kind="maxsim"'], "do not fit together: kind 'maxsim' cannot have num_layers 2"),
        (["--set", 'vocabulary="vocab.txt"'], "SourceError"),
        (["--set", 'start={checkpoint="nowhere", parts=["text"]}'], "holds no checkpoint"),
        (["--set", 'data={kind="flickr8k", folder="nowhere"}'], "DataError"),
    ],
)
def test_an_invalid_run_ends_with_a_sentence(edje_train, options, words):
    done = edje_train(*options)

    assert done.exit_code == 1, done.output
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_missing_recipe_and_a_file_in_place_of_the_folder_end_with_a_sentence(edje_train, out, tmp_path):
    absent = edje_train(path=tmp_path / "absent.toml")
    out.write_text("in the way")
    in_the_way = edje_train()

    assert absent.exit_code == in_the_way.exit_code == 1
    assert "absent.toml cannot be read" in absent.stderr
    assert str(out) in in_the_way.stderr.splitlines()[-1]


def test_a_teacher_with_another_vocabulary_is_refused(finished, out, tmp_path):
    text = student_of(finished, HEAD)
    text = text.replace(", late_interaction = 0.1", "").replace("train_groups = 5", "train_groups = 6")

    with pytest.raises(RecipeError, match=r"has another vocabulary.* set vocabulary = "):
        train(tiny_recipe(tmp_path, text=text), out)

    assert "tokenizer.json" in content(finished / "checkpoint")
    text = f'vocabulary = "{finished}/checkpoint"\n' + text
    train(tiny_recipe(tmp_path, text=text), out)


def test_undecodable_images_are_left_out_and_named_once(out, tmp_path):
    table = write_scenes(tmp_path / "pictures", "train", 20, size=16)
    broken = sorted((tmp_path / "pictures").glob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:40])
    lines = table.read_text().splitlines()
    lines.append(f"{broken.name.replace('-3', '-1')},,train")
    lines.append(f"{broken.name.replace('-3', '-2')},{'word ' * 10_000},train")
    table.write_text("\n".join(lines))
    text = TINY.replace('kind = "scenes"\ntrain_groups = 5\ndev_groups = 1\n', 'kind = "table"\nwhole = true\n')
    text = text.replace("whole = true\n", f'whole = true\ncsv_path = "{table}"\nimage_root = "{table.parent}"\n')
    output = RecordedConsole()

    train(tiny_recipe(tmp_path, "phase.1.crop_views=1", text=text), out, output=output)

    assert output.text.count(broken.name) == 1
    assert "1 image that cannot be decoded" in output.text
    assert metrics(out)[-1]["phase"] == "rank"

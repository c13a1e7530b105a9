"""Long runs on several devices: they resume without repeated data, validate within a phase, and wait for each other."""

from __future__ import annotations

import json
import signal

import pytest
import safetensors.torch
import torch

from edje.data.scenes.dataset import write_scenes
from edje.model.weights import load_checkpoint
from edje.training import run as run_module
from edje.training.state import StateError
from training_harness import (
    SEE_STEPS,
    TINY,
    RecordedConsole,
    at_batch,
    metrics,
    run_processes,
    shown_captions,
    tiny_recipe,
    train,
)

ONE_PHASE = TINY[: TINY.index('[[phase]]\nname = "rank"')]


def interrupt():
    signal.raise_signal(signal.SIGTERM)


# Resuming


@pytest.mark.timeout(600)  # two processes import torch
def test_a_run_of_two_devices_resumes_on_one_without_repeating_or_skipping_a_caption(tmp_path):
    text = ONE_PHASE.replace("batch_size = 16", "batch_size = 8").replace("epochs = 0.6", "epochs = 1")
    recipe = tiny_recipe(tmp_path, text=text)
    out = tmp_path / "runs" / "out"
    out.mkdir(parents=True)
    before = [
        json.loads(output.splitlines()[-1]) for output in run_processes(2, "interrupt", tmp_path / "tiny.toml", out, 2)
    ]
    output = RecordedConsole()

    with shown_captions() as after:
        train(recipe, out, output=output)

    assert before[0] == before[1]
    assert [len(batch) for batch in before[0]] == [16] * 3
    assert [len(batch) for batch in after] == [8] * 6  # two batches for each of the three remaining steps
    shown = [caption for batch in [*before[0], *after] for caption in batch]
    assert len(set(shown)) == len(shown) == 96  # of 100 captions, four do not fill a step
    assert "1 devices now take 2 batches per step instead of 1, so that a step has 16 captions as before" in output.text


def test_a_run_does_not_resume_with_other_data(tmp_path):
    table = write_scenes(tmp_path / "pictures", "train", 20, size=16)
    text = ONE_PHASE.replace(
        'kind = "scenes"\ntrain_groups = 5\ndev_groups = 1\n', f'kind = "table"\nwhole = true\ncsv_path = "{table}"\n'
    )
    recipe = tiny_recipe(tmp_path, text=text)
    with at_batch(1, interrupt), pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "out")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]))

    with pytest.raises(StateError, match="the training data has changed since the run began"):
        train(recipe, tmp_path / "out")

    table.write_text("\n".join(lines))
    train(recipe, tmp_path / "out")


def test_a_run_does_not_resume_within_a_phase_with_fewer_decodable_images(tmp_path):
    table = write_scenes(tmp_path / "pictures", "train", 20, size=16)
    text = ONE_PHASE.replace(
        'kind = "scenes"\ntrain_groups = 5\ndev_groups = 1\n', f'kind = "table"\nwhole = true\ncsv_path = "{table}"\n'
    )
    recipe = tiny_recipe(tmp_path, text=text)
    with at_batch(1, interrupt), pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "out")
    broken = next((tmp_path / "pictures").glob("*.png"))
    broken.write_bytes(broken.read_bytes()[:30])

    with pytest.raises(StateError, match="100 captions were usable when the phase began, now 95"):
        train(recipe, tmp_path / "out")


def test_an_image_that_is_lost_during_training_is_named_once_and_does_not_end_the_run(tmp_path):
    table = write_scenes(tmp_path / "pictures", "train", 20, size=16)
    text = ONE_PHASE.replace(
        'kind = "scenes"\ntrain_groups = 5\ndev_groups = 1\n', f'kind = "table"\nwhole = true\ncsv_path = "{table}"\n'
    )
    lost = next((tmp_path / "pictures").glob("*.png"))
    output = RecordedConsole()

    with at_batch(0, lambda: lost.rename(tmp_path / "elsewhere")):
        train(tiny_recipe(tmp_path, text=text), tmp_path / "out", output=output)

    sentence = f"{lost.name} can no longer be read (the file cannot be read: No such file or directory)"
    assert output.text.count(sentence) == 1


@pytest.mark.timeout(300)
def test_processes_wait_for_one_that_works_longer_than_an_exchange_of_gradients_may_take():
    assert [output.splitlines()[-1] for output in run_processes(2, "long_wait")] == ["True", "True"]


# Validation within a phase


@pytest.fixture
def scripted(monkeypatch):
    """Validations with these results, one after the other."""

    def script(*values):
        results = iter(values)
        monkeypatch.setattr(run_module, "validate", lambda retrieval: {"reranked_r1": next(results)})

    return script


def weights(checkpoint):
    return load_checkpoint(checkpoint).model.state_dict()


def is_same(one, other):
    return all(torch.equal(each, other[name]) for name, each in one.items())


def test_a_phase_validates_every_few_steps_and_keeps_its_best_and_its_latest_checkpoint(tmp_path, scripted):
    scripted(0.1, 0.3, 0.2, 0.2)
    recipe = tiny_recipe(tmp_path, "phase.0.validate_every=1", text=ONE_PHASE)

    checkpoint = train(recipe, tmp_path / "out")

    validations = [(line["step"], line["reranked_r1"]) for line in metrics(tmp_path / "out") if "mlm" not in line]
    assert validations == [(0, 0.1), (1, 0.3), (2, 0.2), (3, 0.2)]
    best, latest = weights(tmp_path / "out" / "best" / "see"), weights(tmp_path / "out" / "after" / "see")
    assert is_same(weights(checkpoint), latest)
    assert not is_same(best, latest)


def test_a_phase_can_end_with_its_best_weights(tmp_path, scripted):
    scripted(0.1, 0.3, 0.2, 0.2)
    recipe = tiny_recipe(tmp_path, "phase.0.validate_every=1", "phase.0.keep=best", text=ONE_PHASE)
    output = RecordedConsole()

    checkpoint = train(recipe, tmp_path / "out", output=output)

    assert "see: the weights of the best validation (0.300) are kept" in output.text
    best = weights(tmp_path / "out" / "best" / "see")
    assert is_same(weights(checkpoint), best)
    assert is_same(weights(tmp_path / "out" / "after" / "see"), best)


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_phase_without_progress_ends_early_and_the_run_goes_on(tmp_path, scripted, is_interrupted):
    scripted(0.3, 0.3, 0.2)
    recipe = tiny_recipe(tmp_path, "phase.0.validate_every=1", "phase.0.patience=2", text=ONE_PHASE)
    output = RecordedConsole()
    if is_interrupted:
        with at_batch(1, interrupt), pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "out")

    train(recipe, tmp_path / "out", output=output)

    assert "see: no better validation in 2 attempts; stopped after step 3" in output.text
    assert max(line["step"] for line in metrics(tmp_path / "out")) == 2 < SEE_STEPS - 1
    assert (tmp_path / "out" / "checkpoint" / "config.json").is_file()
    saved = max((tmp_path / "out" / "state").glob("0*"))
    assert saved.name == "00000003"
    assert not any("optimizer" in name for name in safetensors.torch.load_file(saved / "tensors.safetensors"))

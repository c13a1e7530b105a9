"""Saved states: the latest complete one is found; damaged states and states of other runs are reported."""

from __future__ import annotations

import json

import pytest
from torch import nn

from edje.training.metrics_log import MetricsLog
from edje.training.state import (
    RunInputs,
    RunPosition,
    StateError,
    ValidationHistory,
    batches_per_step,
    check_inputs,
    find_state,
    restore_best,
    restore_module,
    save_best,
    save_state,
)

INPUTS = RunInputs("data", "tower")


@pytest.fixture
def states(tmp_path):
    """States of steps 10 and 20."""
    folder = tmp_path / "state"
    for step in (10, 20):
        save_state(folder, RunPosition(0, step, step), INPUTS, "r1", linear(step), None)
    return folder


def linear(value):
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, float(value))
    return module


def test_the_latest_state_is_found(states):
    saved, damaged = find_state(states, "r1")
    module = linear(0)

    restore_module(saved, module)

    assert damaged == []
    assert saved.position == RunPosition(0, 20, 20)
    assert (module.weight == 20).all()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("state.json", None, "is incomplete"),
        ("tensors.safetensors", None, "is incomplete"),
        ("state.json", lambda data: data[:-5], "is incomplete (state.json is damaged or of another version)"),
        ("state.json", lambda data: data.replace(b'"step":20', b'"step":19'), "was changed or truncated"),
        ("state.json", lambda data: data.replace(b'"step":20', b'"step":-1'), "is incomplete"),
        ("tensors.safetensors", lambda data: data[:-1], "was changed or truncated"),
        ("tensors.safetensors", lambda data: data[:-1] + b"\7", "was changed or truncated"),
    ],
)
def test_a_damaged_state_is_skipped(states, name, damage, words):
    path = states / "00000020" / name
    if damage is None:
        path.unlink()
    else:
        assert damage(path.read_bytes()) != path.read_bytes()
        path.write_bytes(damage(path.read_bytes()))

    saved, damaged = find_state(states, "r1")

    assert saved.position.step == 10
    assert len(damaged) == 1
    assert words in damaged[0]


def test_two_states_are_kept_and_none_of_an_abandoned_continuation(states):
    save_state(states, RunPosition(0, 15, 15), INPUTS, "r1", linear(15), None)

    assert sorted(path.name for path in states.iterdir()) == ["00000010", "00000015"]


def test_state_of_another_recipe_is_refused(states):
    with pytest.raises(
        StateError, match="another recipe: use the recipe that the run began with, or another output folder"
    ):
        find_state(states, "r2")


def test_state_of_another_model_is_refused(states):
    saved, _ = find_state(states, "r1")

    with pytest.raises(StateError, match="does not fit the model that this version builds"):
        restore_module(saved, nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (RunInputs("other data", "tower"), "the training data has changed since the run began"),
        (RunInputs("data", "other tower"), "the published tower has other weights"),
        (RunInputs("data", None), "the published tower has other weights"),
    ],
)
def test_state_of_other_data_or_another_tower_is_refused(states, inputs, words):
    saved, _ = find_state(states, "r1")

    check_inputs(saved, INPUTS)
    with pytest.raises(StateError, match=words):
        check_inputs(saved, inputs)


@pytest.mark.parametrize(("num_devices", "expected"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_with_another_number_of_devices_a_step_has_as_many_captions_as_before(num_devices, expected):
    saved = RunPosition(0, 10, 10, captions_per_step=256, num_captions=5000)

    assert batches_per_step(saved, 32, 1, num_devices, 5000) == expected


def test_a_number_of_devices_that_cannot_take_the_same_steps_is_refused():
    saved = RunPosition(0, 10, 10, captions_per_step=256, num_captions=5000)

    with pytest.raises(StateError, match=r"3 devices with batches of 32 cannot take: .* that divides 8"):
        batches_per_step(saved, 32, 1, 3, 5000)
    assert batches_per_step(RunPosition(1, 0, 10, captions_per_step=256), 32, 2, 3, 4000) == 2  # a new phase


def test_another_number_of_usable_captions_within_a_phase_is_refused():
    saved = RunPosition(0, 10, 10, captions_per_step=256, num_captions=5000)

    with pytest.raises(StateError, match="5,000 captions were usable when the phase began, now 4,995"):
        batches_per_step(saved, 32, 1, 8, 4995)


def test_constant_tensors_are_not_saved_and_stay_as_they_are(tmp_path):
    saved_module, module = nn.Sequential(linear(1), linear(2)), nn.Sequential(linear(3), linear(4))
    save_state(tmp_path, RunPosition(0, 1, 1), INPUTS, "r1", saved_module, None, constant=("0.",))

    saved, _ = find_state(tmp_path, "r1")
    restore_module(saved, module, constant=("0.",))

    assert {name for name in saved.tensors if "0." in name} == set()
    assert (module[0].weight == 3).all()
    assert (module[1].weight == 2).all()


def test_the_best_weights_are_kept_beside_the_states(states):
    module = linear(0)
    save_best(states, linear(7))
    restore_best(states, module)

    assert (module.weight == 7).all()
    assert find_state(states, "r1")[0].position.step == 20
    (states / "best.safetensors").write_bytes(b"cut")
    with pytest.raises(StateError, match=r"best\.safetensors cannot be read"):
        restore_best(states, module)


def test_validations_are_counted_since_the_best_one():
    history = ValidationHistory()
    for value in (0.1, 0.3, 0.3, 0.2):
        history = history.after(value)

    assert history == ValidationHistory(0.3, 2)
    assert history.after(0.4) == ValidationHistory(0.4, 0)


def test_a_resumed_metrics_log_removes_the_lines_after_the_state(tmp_path):
    with MetricsLog(tmp_path, resume_step=0, num_lines=0) as log:
        for step in (0, 1):
            log.write(step, "see", {"mlm": 1.5})
        assert log.num_lines == 2
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "ph')  # the process was killed within a line

    with MetricsLog(tmp_path, resume_step=1, num_lines=1) as log:
        log.write(1, "see", {"mlm": 0.5})

    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [{"step": 0, "phase": "see", "mlm": 1.5}, {"step": 1, "phase": "see", "mlm": 0.5}]


def test_a_new_metrics_log_removes_the_lines_of_an_earlier_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("something else\n")

    with MetricsLog(tmp_path, resume_step=0, num_lines=0):
        pass

    assert (tmp_path / "metrics.jsonl").read_text() == ""

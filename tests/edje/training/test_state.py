"""Saved states: the latest complete one is found; damaged states and states of other runs are reported."""

from __future__ import annotations

import json

import pytest
from torch import nn

from edje.training.metrics_log import MetricsLog
from edje.training.state import RunPosition, StateError, find_state, restore_module, save_state


@pytest.fixture
def states(tmp_path):
    """States of steps 10 and 20."""
    folder = tmp_path / "state"
    for step in (10, 20):
        save_state(folder, RunPosition(0, step, step, score_statistics=(0.1, 0.2)), "r1", linear(step), None)
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
    assert saved.position == RunPosition(0, 20, 20, score_statistics=(0.1, 0.2))
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
    save_state(states, RunPosition(0, 15, 15), "r1", linear(15), None)

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

"""The state on the disk: the last whole one is found, and what is not whole or not of this run is told."""

from __future__ import annotations

import json

import pytest
from torch import nn

from edje.training.journal import Journal
from edje.training.state import Place, StateError, find_state, restore_module, save_state


@pytest.fixture
def states(tmp_path):
    """States of steps 10 and 20."""
    folder = tmp_path / "state"
    for step in (10, 20):
        save_state(folder, Place(0, step, step, score_spread=(0.1, 0.2)), "r1", linear(step), None)
    return folder


def linear(value):
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, float(value))
    return module


def test_the_last_state_is_found(states):
    saved, passed_over = find_state(states, "r1")
    module = linear(0)

    restore_module(saved, module)

    assert passed_over == []
    assert saved.place == Place(0, 20, 20, score_spread=(0.1, 0.2))
    assert (module.weight == 20).all()


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("state.json", None, "is not whole"),
        ("tensors.safetensors", None, "is not whole"),
        ("state.json", lambda data: data[:-5], "is not whole (state.json is not what was written)"),
        ("state.json", lambda data: data.replace(b'"step":20', b'"step":19'), "was changed or cut off"),
        ("state.json", lambda data: data.replace(b'"step":20', b'"step":-1'), "is not whole"),
        ("tensors.safetensors", lambda data: data[:-1], "was changed or cut off"),
        ("tensors.safetensors", lambda data: data[:-1] + b"\7", "was changed or cut off"),
    ],
)
def test_a_state_that_is_not_whole_is_passed_over(states, name, spoil, words):
    path = states / "00000020" / name
    if spoil is None:
        path.unlink()
    else:
        assert spoil(path.read_bytes()) != path.read_bytes()
        path.write_bytes(spoil(path.read_bytes()))

    saved, passed_over = find_state(states, "r1")

    assert saved.place.step == 10
    assert len(passed_over) == 1
    assert words in passed_over[0]


def test_two_states_are_kept_and_none_of_a_way_that_was_left(states):
    save_state(states, Place(0, 15, 15), "r1", linear(15), None)

    assert sorted(path.name for path in states.iterdir()) == ["00000010", "00000015"]


def test_state_of_another_recipe_is_refused(states):
    with pytest.raises(StateError, match="another recipe: give the recipe it was begun with, or another output folder"):
        find_state(states, "r2")


def test_state_of_another_model_is_refused(states):
    saved, _ = find_state(states, "r1")

    with pytest.raises(StateError, match="no longer builds"):
        restore_module(saved, nn.Linear(3, 2))


def test_a_journal_takes_back_what_was_said_after_the_state(tmp_path):
    with Journal(tmp_path, resume_step=0, num_lines=0) as journal:
        for step in (0, 1):
            journal.say(step, "see", {"mlm": 1.5})
        assert journal.num_lines == 2
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "ph')  # and a kill in the middle of a line

    with Journal(tmp_path, resume_step=1, num_lines=1) as journal:
        journal.say(1, "see", {"mlm": 0.5})

    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert told == [{"step": 0, "phase": "see", "mlm": 1.5}, {"step": 1, "phase": "see", "mlm": 0.5}]


def test_a_journal_that_begins_forgets_an_earlier_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("something else\n")

    with Journal(tmp_path, resume_step=0, num_lines=0):
        pass

    assert (tmp_path / "metrics.jsonl").read_text() == ""

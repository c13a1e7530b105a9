"""The command `python -m edje.calibrate`: a copy of an untrained checkpoint, calibrated on a few drawn scenes."""

from __future__ import annotations

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from edje.calibrate import main
from edje.checkpoint import read_config
from edje.init import write_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    write_untrained(VARIANTS["tiny"], folder / "model", seed=0)
    (folder / "scenes.toml").write_text('kind = "scenes"\ndev_groups = 1\n')
    np.save(folder / "similarity.npy", np.random.default_rng(0).random((20, 4), np.float32))
    return folder


@pytest.fixture
def calibrate(folder):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)

    def run(out, *options):
        words = [folder / "model", "--data", folder / "scenes.toml", "--out", out, "--features", folder / "features"]
        given = [*words, "--first-stage", folder / "similarity.npy", *options]
        return CliRunner().invoke(app, list(map(str, given)), env={"COLUMNS": "200"})

    return run


def test_the_copy_has_the_weights_a_calibration_and_a_digest_of_its_own(calibrate, folder):
    done = calibrate(folder / "copy", "--k", "4")

    assert done.exit_code == 0, done.output
    original, copy = load_checkpoint(folder / "model"), load_checkpoint(folder / "copy")
    assert original.config.calibration is None
    assert copy.config.calibration.text_to_image.temperature > 0
    assert copy.digest != original.digest
    assert copy.digest in done.stdout
    assert "image-to-text: " in done.stderr
    weights = original.model.state_dict()
    assert all((tensor == weights[name]).all() for name, tensor in copy.model.state_dict().items())


def test_a_depth_beyond_the_candidates_ends_the_command_with_a_sentence(calibrate, folder):
    done = calibrate(folder / "deep", "--k", "5")

    assert done.exit_code == 1
    assert "k = 5 with 4 candidates" in done.stderr
    assert not (folder / "deep").exists()


def test_a_folder_that_holds_something_is_not_overwritten(calibrate, folder):
    assert calibrate(folder / "model", "--k", "4").exit_code == 2
    assert read_config(folder / "model").calibration is None

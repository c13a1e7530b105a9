"""The recipe for a table of one's own images: trained in miniature, from the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from edje.first_stage.load import load_first_stage
from edje.model.weights import load_checkpoint
from edje.recipe_file import read_recipe
from edje.train import main
from graph_towers import noise, patch_graph
from hub_folders import write_bert

RECIPE = Path(__file__).parents[3] / "edje" / "recipes" / "own.toml"
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 220), "white": (240, 240, 240)}


@pytest.fixture
def table(tmp_path):
    """A table without splits, and its images in the same folder: left and right half each in a colour."""
    names = [(left, right) for left in COLOURS for right in COLOURS for _ in range(4)]
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number, (left, right) in enumerate(names):
            pixels = np.full((16, 16, 3), COLOURS[left], np.uint8)
            pixels[:, 8:] = COLOURS[right]
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            writer.writerow([f"{number}.png", f"{left} on the left and {right} on the right"])
            writer.writerow([f"{number}.png", f"a picture in {left} and {right}"])
    return tmp_path / "captions.csv"


def test_the_recipe_reads_a_table_beside_its_images_and_divides_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    recipe = read_recipe(RECIPE, ["data.csv_path=mine/captions.csv"])

    assert recipe.data.csv_path == tmp_path / "mine" / "captions.csv"
    assert recipe.data.image_root is None
    assert recipe.data.dev_share == recipe.data.test_share == 0.1


def test_a_table_of_captioned_images_becomes_a_model(table, tmp_path):
    write_bert(tmp_path / "bert")
    (tmp_path / "tower.onnx").write_bytes(patch_graph(noise(8, 3, 4, 4)).SerializeToString())
    changes = {
        "data.csv_path": table,
        "tower": f"onnx:{tmp_path}/tower.onnx",
        "joint.bert": tmp_path / "bert",
        "joint.text_layers": 1,
        "joint.visual_layers": 0,
        "joint.num_layers": 1,
        "joint.match_dim": 8,
        "adapter.num_tokens": 4,
        "adapter.hidden_dim": 16,
        "first_stage.dim": 4,
        "phase.0.epochs": 0.3,
        "phase.0.batch_size": 16,
        "k": 4,
    }
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    words = [RECIPE, "--out", tmp_path / "out", "--features", tmp_path / "features", "--device", "cpu"]
    for name, value in changes.items():
        words += ["--set", f"{name}={value}"]

    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "400"})

    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "out" / "checkpoint")
    assert "reranked_r1" in done.stderr
    assert load_checkpoint(tmp_path / "out" / "checkpoint").config.name == "own"
    assert load_first_stage(tmp_path / "out" / "checkpoint").dim == 4

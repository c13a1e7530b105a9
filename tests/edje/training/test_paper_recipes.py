"""The paper's recipes: their values are the paper's, and each trains in miniature on drawn images."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from edje.evaluate import main
from edje.evaluation.report import read_report
from edje.first_stage.hub import HubFirstStage
from edje.first_stage.load import load_first_stage
from edje.model.weights import load_checkpoint
from edje.recipe_file import read_recipe
from edje.training.batches.corpus import Captions
from edje.training.devices import Devices
from edje.training.first_stage.vector_cache import cached_embeddings
from edje.training.run import RunFolders, start_run
from hub_folders import write_bert, write_pair_of_encoders, write_pictures
from training_harness import at_batch

RECIPES = Path(__file__).parents[3] / "edje" / "recipes"
NAMES = ("paper-local", "paper", "paper-coco")
NUM_PATCHES = 16


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_values_of_the_paper(name):
    recipe = read_recipe(RECIPES / f"{name}.toml")

    [phase] = recipe.phase
    assert recipe.tower == "hub:google/siglip2-large-patch16-384"
    assert recipe.joint.bert == "hub:microsoft/MiniLM-L12-H384-uncased"
    assert recipe.first_stage.kind == "hub"
    assert recipe.max_caption_pieces + 3 == 64
    assert recipe.adapter.num_tokens == (576 if name == "paper-local" else 64)
    assert recipe.adapter.hidden_dim == 8192
    assert phase.learning_rate == (2e-5 if name == "paper-coco" else 3e-4)
    assert (phase.weight_decay, phase.warmup_steps, phase.start_learning_rate) == (0.05, 100, 1e-6)
    assert (phase.decay, phase.decay_per_epoch, phase.precision) == ("per_epoch", 0.9, "bf16")
    losses = {"itm"} if name == "paper-coco" else {"itm", "mlm", "text_recovery"}
    assert set(phase.losses) == losses | (set() if name == "paper-local" else {"distillation"})
    assert set(phase.losses.values()) == {1.0}
    assert phase.negatives.source == "batch"


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_a_recipe_are_relative_to_its_folder(name):
    data = read_recipe(RECIPES / f"{name}.toml").data

    coco = data if name == "paper-coco" else data.parts["coco"]
    assert coco.image_root.resolve() == RECIPES.parent.parent / "data" / "coco"


class Miniature:
    """The recipes with a tiny SigLIP, a tiny BERT and a few images."""

    def __init__(self, folder):
        self.folder = folder
        write_pair_of_encoders(folder / "siglip", "siglip")
        write_bert(folder / "bert")
        listed, pictures = write_pictures(folder / "coco"), folder / "coco" / "pictures"
        table = folder / "web.csv"
        table.write_text("image,caption\n" + "".join(f"{number}.png,a grey picture\n" for number in range(4, 8)))
        coco = f'{{kind = "karpathy", json_path = "{listed}", image_root = "{pictures}"}}'
        web = f'{{kind = "table", csv_path = "{table}", image_root = "{pictures}", whole = true}}'
        several = f'{{kind = "several", train_only = ["web"], parts = {{coco = {coco}, web = {web}}}}}'
        (folder / "data.toml").write_text(f"data = {coco}\n")
        self._changes = {
            "tower": f'"hub:{folder / "siglip"}"',
            "joint.bert": f'"{folder / "bert"}"',
            "adapter.hidden_dim": "24",
            "phase.0.batch_size": "8",
            "dev_captions": "4",
            "k": "2",
        }
        self._of_recipe = {
            "paper-local": {"data": several, "adapter.num_tokens": f"{NUM_PATCHES}", "phase.0.epochs": "0.7"},
            "paper": {"data": several, "adapter.num_tokens": "4", "phase.0.epochs": "0.7"},
            "paper-coco": {"data": coco, "adapter.num_tokens": "4", "phase.0.epochs": "0.7"},
        }
        for name in ("paper", "paper-coco"):
            self._of_recipe[name]["phase.0.teacher"] = f'"{self.out("paper-local") / "checkpoint"}"'
        self._of_recipe["paper-coco"]["start.checkpoint"] = f'"{self.out("paper") / "checkpoint"}"'

    def out(self, name):
        return self.folder / "build" / name

    def train(self, name, out=None, **more):
        changes = self._changes | self._of_recipe[name] | more
        recipe = read_recipe(RECIPES / f"{name}.toml", [f"{key}={value}" for key, value in changes.items()])
        folders = RunFolders(out or self.out(name), self.folder / "features")
        return start_run(recipe, folders, Devices(torch.device("cpu")), Console(file=io.StringIO()), save_every=100)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """All three, one after the other."""
    pytest.importorskip("transformers")
    miniature = Miniature(tmp_path_factory.mktemp("paper"))
    for name in NAMES:
        miniature.train(name)
    return miniature


def losses_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "itm" in line]


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_each_recipe_change_the_model(miniature, name):
    steps = losses_of(miniature.out(name))

    assert len(steps) == 2
    assert ("distillation" in steps[0]) == (name != "paper-local")
    assert ("text_recovery" in steps[0]) == (name != "paper-coco")
    loaded = load_checkpoint(miniature.out(name) / "checkpoint")
    assert loaded.config.adapter.num_tokens == (NUM_PATCHES if name == "paper-local" else 4)
    assert float(loaded.model.joint.head.out.weight.abs().max()) > 0  # it is initialised with zeros


def test_the_state_of_a_run_has_no_published_tower_and_it_resumes_all_the_same(miniature, tmp_path):
    with at_batch(1, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(KeyboardInterrupt):
        miniature.train("paper", tmp_path, **{"phase.0.epochs": "1.5"})
    [state] = (tmp_path / "state").glob("0*")
    names = safetensors.torch.load_file(state / "tensors.safetensors").keys()

    checkpoint = miniature.train("paper", tmp_path, **{"phase.0.epochs": "1.5"})

    assert not [name for name in names if ".vision." in name]
    assert [name for name in names if ".adapter." in name]
    tower, other = (
        {name: each for name, each in load_checkpoint(path).model.state_dict().items() if name.startswith("vision.")}
        for path in (checkpoint, miniature.out("paper") / "checkpoint")
    )
    assert tower
    assert all(torch.equal(each, other[name]) for name, each in tower.items())


def test_fine_tuning_starts_from_the_pre_trained_weights(miniature):
    states = [
        load_checkpoint(miniature.out(name) / "checkpoint").model.state_dict() for name in ("paper", "paper-coco")
    ]

    moved = max(
        float((after - before).abs().max()) for before, after in zip(*(s.values() for s in states), strict=True)
    )

    assert 0 < moved < 1e-3  # two steps at a learning rate of 2e-5


def test_a_checkpoint_is_evaluated_with_the_first_stage_of_its_training(miniature):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    checkpoint = miniature.out("paper") / "checkpoint"
    options = ["--data", miniature.folder / "data.toml", "--features", miniature.folder / "features", "--split", "dev"]
    options += ["--k", "3", "--direction", "text-to-image", "--captions", "5", "--resamples", "5"]

    done = CliRunner().invoke(app, list(map(str, [checkpoint, *options])), env={"COLUMNS": "200"})

    assert done.exit_code == 0, done.output
    report = read_report(done.stdout.splitlines()[-1])
    assert report.data == "list dev, 5 of 8 captions as queries"
    assert report.results[0].comparison.num_queries == 5
    assert isinstance(load_first_stage(checkpoint), HubFirstStage)


def test_a_tower_that_runs_in_every_step_gives_the_losses_of_stored_features(miniature, tmp_path):
    miniature.train("paper", tmp_path, keeps_patches="true")

    kept, live = losses_of(tmp_path), losses_of(miniature.out("paper"))

    for one, other in zip(kept, live, strict=True):
        for name in ("itm", "mlm", "text_recovery", "distillation"):
            assert one[name] == pytest.approx(other[name], abs=2e-3)  # features are stored in half precision


def test_first_stage_embeddings_are_computed_once(miniature, tmp_path, monkeypatch):
    first_stage = load_first_stage(miniature.out("paper") / "checkpoint")
    texts = ("a red picture", "a blue picture", "plain")
    captions = Captions(texts, np.zeros((3, 1), np.int32), *(np.zeros(3, np.int64) for _ in range(3)))
    pooled = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float16)
    expected = first_stage.caption_vectors(texts, []), first_stage.image_vectors(pooled)

    kept = cached_embeddings(first_stage, captions, pooled, tmp_path, shows_progress=False)
    monkeypatch.setattr(HubFirstStage, "caption_vectors", None)  # must not be called again
    again = cached_embeddings(first_stage, captions, pooled, tmp_path, shows_progress=False)

    for vectors, same, exact in zip(kept, again, expected, strict=True):
        assert vectors == pytest.approx(exact, abs=1e-3)
        assert (vectors == same).all()

"""The command `python -m edje.evaluate`: an untrained checkpoint on a few drawn scenes, with every kind of scorer."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from edje.data.dataset import CaptionedImage, DataError, Dataset, Problems
from edje.data.spec import ScenesSpec, open_dataset
from edje.evaluate import main
from edje.evaluation.cascade import Cascade
from edje.evaluation.cost import ScorerCost
from edje.evaluation.data_file import read_data_spec
from edje.evaluation.encoded_split import encode_split
from edje.evaluation.errors import ScorerUnknown, SplitUnusable
from edje.evaluation.report import read_report
from edje.evaluation.scorers import cost_of_scorer, make_scorer
from edje.images import ImageError
from edje.init import write_untrained
from edje.model.variants import VARIANTS

NUM_GROUPS = 3
ORACLE = """
import numpy as np

def factory(split):
    assert len(split.stored.blobs) == len(split.image_ids)
    return lambda captions, images: (split.image_of_caption[captions] == images).astype(np.float32)

def broken(split):
    return lambda captions, images: np.full(len(captions), np.nan, np.float32)

def nothing(split):
    return None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, data, random similarities, and a module of scorers."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_untrained(VARIANTS["tiny"], folder / "model", seed=0)
    (folder / "scenes.toml").write_text(f'[data]\nkind = "scenes"\ntest_groups = {NUM_GROUPS}\n')
    dataset = scenes()
    similarity = np.random.default_rng(0).random((dataset.num_captions, len(dataset.images)), np.float32)
    np.save(folder / "similarity.npy", similarity)
    (folder / "scorers_of_this_test.py").write_text(ORACLE)
    return folder


def scenes():
    return open_dataset(ScenesSpec(kind="scenes", test_groups=NUM_GROUPS), "test", strict=True)


def load(folder, dataset, storage="int8", **options):
    return encode_split(folder / "model", dataset, "test", storage, features=folder / "features", **options)


@pytest.fixture
def evaluate(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)

    def run(*options):
        arguments = [folder / "model", "--data", folder / "scenes.toml", "--first-stage", folder / "similarity.npy"]
        words = [*arguments, "--features", folder / "features", "--k", "4", "--resamples", "20", *options]
        return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})

    return run


def test_a_perfect_scorer_ranks_first_every_positive_among_the_candidates(evaluate, folder):
    done = evaluate("--scorer", "scorers_of_this_test:factory", "--out", folder / "report.json", "--k", "12")

    assert done.exit_code == 0, done.output
    last_line = done.stdout.splitlines()[-1]
    assert (folder / "report.json").read_text() == last_line + "\n"
    report = read_report(last_line)
    assert [(each.comparison.direction, each.comparison.k) for each in report.results] == [
        ("text-to-image", 4),
        ("text-to-image", 12),
        ("image-to-text", 4),
        ("image-to-text", 12),
    ]
    for result in report.results:
        comparison = result.comparison
        assert comparison.row("R@1").reranked.value == comparison.row(f"R@{comparison.k}").first_stage.value
    assert report.results[1].comparison.row("R@1").reranked.value == 1.0  # all 12 images were offered
    assert (report.payload_bytes_per_image, report.storage) == (16 * 64 + 16 * 4, "int8")


def test_the_report_of_the_models_scorer_states_its_cost_and_that_the_model_is_untrained(evaluate, folder):
    done = evaluate("--direction", "text-to-image", "--storage", "none", "--markdown", folder / "report.md")

    assert done.exit_code == 0, done.output
    assert "UNTRAINED" in done.stderr
    assert "R@10" in done.stdout
    assert "GFLOP per pair" in (folder / "report.md").read_text()
    [result] = json.loads(done.stdout.splitlines()[-1])["results"]
    assert result["cost"]["gflop_per_pair"] > 0


def test_a_score_that_is_not_finite_ends_the_command_with_a_sentence(evaluate):
    done = evaluate("--scorer", "scorers_of_this_test:broken")

    assert done.exit_code == 1
    assert "the score of query 0 with candidate" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ("no_such_module_anywhere:factory", "cannot be imported"),
        ("scorers_of_this_test:absent", "has no function absent"),
        ("scorers_of_this_test:nothing", "returned NoneType"),
        ("maxsim", "needs a model with a late interaction"),
        ("cascade:2", "needs a model with a late interaction"),
    ],
)
def test_a_scorer_that_cannot_be_made_ends_the_command_with_a_sentence(evaluate, scorer, words):
    done = evaluate("--scorer", scorer, "--direction", "text-to-image")

    assert done.exit_code == 1
    assert words in done.stderr


def test_a_depth_beyond_the_candidates_is_refused_before_anything_is_computed(evaluate):
    done = evaluate("--k", "13", "--direction", "text-to-image")

    assert done.exit_code == 1
    assert "k = 13 with 12 candidates: choose k from 1 to 12" in done.stderr


@pytest.mark.parametrize(
    "options", [("--scorer", "unknown"), ("--scorer", "cascade:x"), ("--out", "/nowhere/at/all.json")]
)
def test_an_invalid_command_line_exits_with_2(evaluate, options):
    assert evaluate(*options).exit_code == 2


def test_similarities_of_another_shape_are_refused(evaluate, folder):
    np.save(folder / "small.npy", np.zeros((3, 3), np.float32))

    done = evaluate("--first-stage", folder / "small.npy")

    assert done.exit_code == 1
    assert "shape (3, 3); these data have 60 captions and 12 images" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("kind = ", "not a valid TOML"),
        ("[data]\nkind = 'films'", "films"),
        ("[data]\nkind = 'scenes'\ncolour = 1", "colour"),
    ],
)
def test_a_file_that_describes_no_dataset_is_reported_in_a_sentence(content, words, tmp_path):
    (tmp_path / "data.toml").write_text(content)

    with pytest.raises(DataError, match=words):
        read_data_spec(tmp_path / "data.toml")


def test_a_file_holds_the_data_table_alone_or_in_a_recipe(tmp_path):
    (tmp_path / "alone.toml").write_text('kind = "scenes"\nseed = 3\n')
    (tmp_path / "recipe.toml").write_text('name = "x"\n[data]\nkind = "scenes"\nseed = 3\n[model]\n')

    assert read_data_spec(tmp_path / "alone.toml") == ScenesSpec(kind="scenes", seed=3)
    assert read_data_spec(tmp_path / "recipe.toml") == ScenesSpec(kind="scenes", seed=3)
    with pytest.raises(DataError, match="cannot be read"):
        read_data_spec(tmp_path / "absent.toml")


class OneBroken:
    def pixels(self, index, size, resample):
        if index == 1:
            raise ImageError("image_broken", "the image cannot be decoded")
        return np.zeros((3, size, size), np.uint8)


def test_an_image_that_does_not_decode_stops_the_evaluation(folder):
    images = tuple(CaptionedImage(f"image-{number}", ("a dog",)) for number in range(3))
    dataset = Dataset("pictures", images, Problems(), "fingerprint", OneBroken())
    np.save(folder / "three.npy", np.zeros((3, 3), np.float32))

    with pytest.raises(DataError, match="image-1"):
        load(folder, dataset, first_stage=str(folder / "three.npy"))


def test_images_without_captions_are_refused(folder):
    with pytest.raises(SplitUnusable, match="every image needs a caption"):
        load(folder, replace(scenes(), images=(CaptionedImage("a", ()),)))


def test_maxsim_as_first_stage_needs_a_late_interaction(folder):
    with pytest.raises(SplitUnusable, match="no late interaction to search with"):
        load(folder, scenes(), first_stage="maxsim")


def test_a_model_with_a_late_interaction_has_a_cheap_scorer_a_cascade_and_a_first_stage(tmp_path):
    tiny = VARIANTS["tiny"]
    joint = replace(tiny.joint, kind="minimal", num_layers=1, text_layers=1, visual_layers=1, match_dim=16)
    write_untrained(replace(tiny, joint=joint), tmp_path / "model", seed=0)
    split = load(tmp_path, scenes(), first_stage="maxsim", storage="fp16")
    captions, images = (indices.ravel() for indices in np.indices(split.similarity.shape))

    cheap = make_scorer("maxsim", split, "text-to-image")
    cascade = make_scorer("cascade:3", split, "image-to-text")

    assert cheap(captions, images) == pytest.approx(split.similarity.ravel(), abs=1e-4)
    assert isinstance(cascade, Cascade)
    full_cost, cheap_cost, both = (cost_of_scorer(name, split, 6) for name in ("torch", "maxsim", "cascade:3"))
    assert 0 < cheap_cost.gflop_per_pair < full_cost.gflop_per_pair
    assert both.gflop_per_pair == pytest.approx(cheap_cost.gflop_per_pair + full_cost.gflop_per_pair / 2)
    assert len(set(split.group_of_image)) == NUM_GROUPS


def test_a_score_does_not_depend_on_the_other_pairs_of_a_call(folder):
    split = load(folder, scenes(), first_stage=str(folder / "similarity.npy"))
    scorer = make_scorer("torch", split, "text-to-image")
    captions, images = np.arange(40), np.arange(40) % 12

    together = scorer(captions, images)
    alone = [scorer(captions[number : number + 1], images[number : number + 1])[0] for number in range(40)]

    assert together == pytest.approx(alone, abs=1e-4)


class TwoScorers:
    """A split that records which scorer is called with which pairs."""

    def __init__(self):
        self.calls = []
        self.costs = {"torch": ScorerCost(0.0, 1.0)}

    def _made(self, name):
        def score(captions, images):
            self.calls.append((name, captions.tolist(), images.tolist()))
            return images.astype(np.float32)

        return score

    @property
    def scorers(self):
        return {"torch": lambda: self._made("torch"), "maxsim": lambda: self._made("maxsim")}


def test_a_scorer_takes_captions_first_in_both_directions():
    split = TwoScorers()

    make_scorer("torch", split, "text-to-image")(np.array([1]), np.array([2]))
    make_scorer("torch", split, "image-to-text")(np.array([1]), np.array([2]))
    make_scorer("cascade:1", split, "image-to-text")(np.array([1]), np.array([2]))

    assert split.calls == [("torch", [1], [2]), ("torch", [2], [1]), ("maxsim", [2], [1]), ("torch", [2], [1])]


def test_the_error_for_an_unknown_scorer_lists_the_known_ones():
    with pytest.raises(ScorerUnknown, match=r"unknown scorer 'best': choose torch, maxsim, cascade:BUDGET"):
        make_scorer("best", TwoScorers(), "text-to-image")


def test_a_scorer_without_a_known_cost_has_none():
    assert cost_of_scorer("some.module:factory", TwoScorers(), 10) is None
    assert cost_of_scorer("cascade:3", TwoScorers(), 10) is None

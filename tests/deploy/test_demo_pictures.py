"""The demo's pictures, questions and first stages: drawn scenes, or a folder of the user's pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import demo_choices
from demo_choices import PHOTOGRAPHS, UNTRAINED, Choices
from demo_dual_encoder import VectorIndex, pooled_here
from demo_first_stage import WordOverlap
from demo_pictures import caption_of, pictures_with_captions, pictures_with_queries, queries_of
from demo_scenes import NUM_PICTURES, QUERY_EVERY, drawn_scenes
from edje.checkpoint import CheckpointMissing
from edje.data.scenes.dataset import holdout
from edje.first_stage.base import save_first_stage
from edje.first_stage.dual_encoder import DualEncoder, DualEncoderConfig
from edje.init import write_untrained
from edje.model.initialisation import initialise
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint
from server_process import ServiceError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three groups of four scenes."""
    return drawn_scenes(tmp_path_factory.mktemp("scenes") / "new", num_pictures=12, size=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained checkpoint with a first stage."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny = VARIANTS["tiny"]
    write_untrained(tiny, folder, seed=0)
    config = DualEncoderConfig(dim=8, vocab_size=tiny.joint.vocab_size, image_dim=tiny.vision.pooled_dim, text_dim=8)
    model = DualEncoder(config)
    initialise(model, seed=0)
    save_first_stage(folder, model)
    return folder


def test_the_caption_with_more_and_rarer_words_of_the_query_is_first():
    stage = WordOverlap({"a": "a red cup", "b": "a blue dog", "c": "a red dog"})

    assert [name for name, _ in stage.images("a DOG that is red", 3)] == ["c", "a", "b"]
    assert [name for name, _ in stage.images("a cup, or a dog", 3)] == ["a", "b", "c"]


def test_captions_that_share_nothing_stay_in_order():
    assert WordOverlap({"b": "cup", "a": "dog"}).images("nothing", 2) == [("a", 0.0), ("b", 0.0)]


def test_texts_are_found_by_what_they_share_with_the_caption_of_the_image():
    stage = WordOverlap({"a": "a red cup", "b": "a blue dog"})

    assert [name for name, _ in stage.texts("b", {"x": "cups", "y": "dog", "z": "a dog, blue"}, 2)] == ["z", "y"]


def test_a_caption_is_the_words_of_a_file_name():
    assert caption_of("holiday/red-cup_of coffee.v2.jpg") == "holiday red cup of coffee v2"
    assert caption_of("....png") == "....png"


@pytest.fixture
def folder(tmp_path):
    """A folder with three pictures, one of them in a subfolder."""
    for name in ("red-cup.jpg", "black cat.jpg", "beach/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def test_a_caption_table_gives_queries_whose_right_picture_is_known(folder):
    table = folder / "captions.csv"
    table.write_text("image,caption\nbeach/1.jpg,a dog on a beach\nbeach/1.jpg,sand and waves\nred-cup.jpg,a cup\n")

    pictures = pictures_with_captions(folder, table)
    questions = pictures.questions(WordOverlap(pictures.described))

    assert pictures.queries == {"a dog on a beach": "beach/1.jpg", "a cup": "red-cup.jpg"}
    assert [question.right for question in questions] == ["beach/1.jpg", "red-cup.jpg", "beach/1.jpg"]
    assert questions[-1].image_id == "beach/1.jpg"
    assert pictures.captions["black cat.jpg"] == "black cat"
    assert len(pictures.files) == 3


def test_a_first_stage_without_vectors_does_not_read_the_caption_that_is_the_query(folder):
    table = folder / "captions.csv"
    table.write_text("image,caption\nbeach/1.jpg,a dog on a beach\nbeach/1.jpg,sand and waves\nred-cup.jpg,a mug\n")

    described = pictures_with_captions(folder, table).described

    assert described["beach/1.jpg"] == "sand and waves"
    assert described["red-cup.jpg"] == "red cup"


def test_queries_are_asked_and_nothing_is_known_to_be_right(folder):
    pictures = pictures_with_queries(folder, ["a cup", "a cat"])

    questions = pictures.questions(WordOverlap(pictures.described))

    assert [(question.text, question.right) for question in questions] == [("a cup", None), ("a cat", None)]
    assert questions[0].options[0].name == "red-cup.jpg"


def test_queries_come_from_a_text_or_a_file(tmp_path):
    (tmp_path / "queries.txt").write_text("a dog\n\n a cat \na dog\n")

    assert queries_of(str(tmp_path / "queries.txt")) == queries_of("a dog; a cat;a dog") == ["a dog", "a cat"]
    with pytest.raises(ServiceError, match="holds no text"):
        queries_of(" ; ")


def test_all_pictures_of_a_folder_are_used(tmp_path):
    for number in range(700):
        (tmp_path / f"{number}.jpg").touch()

    assert len(pictures_with_queries(tmp_path, []).files) == 700


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda here: pictures_with_queries(here / "nowhere", ["a"]), "there is no such folder"),
        (lambda here: pictures_with_queries(here, ["a"]), "holds 1 image files; at least 2 are needed"),
        (lambda here: Choices.of({"IMAGES": str(here)}).pictures(here / "new"), "set CAPTIONS .* or QUERIES"),
        (lambda here: Choices.of({"QUERIES": "a dog"}), "set IMAGES to their folder"),
        (lambda here: Choices.of({"IMAGES": "x", "QUERIES": "a", "CAPTIONS": "b"}), "not both"),
    ],
)
def test_a_missing_choice_is_an_error_that_names_the_variable_to_set(tmp_path, make, sentence):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.jpg")

    with pytest.raises(ServiceError, match=sentence):
        make(tmp_path)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [("image,caption\nother.jpg,a dog\n", "no usable image"), ("name,text\na,b\n", "CAPTIONS="), (None, "CAPTIONS=")],
)
def test_a_caption_table_that_does_not_fit_is_an_error_that_names_it(folder, table, sentence):
    path = folder / "captions.csv"
    if table is not None:
        path.write_text(table)

    with pytest.raises(ServiceError, match=sentence):
        pictures_with_captions(folder, path)


def test_a_search_needs_a_checkpoint_with_a_first_stage(tmp_path, checkpoint):
    write_untrained(VARIANTS["tiny"], tmp_path / "without", seed=0)

    Choices(own_checkpoint=checkpoint).check_search()
    with pytest.raises(ServiceError, match="has no first stage"):
        Choices(own_checkpoint=tmp_path / "without").check_search()


def test_the_scenes_are_files_of_unseen_scenes(pictures):
    unseen = {f"{image.image_id}.png": image.captions for image in holdout(12, seed=1).images}

    assert [file.image_id for file in pictures.files] == sorted(unseen)
    assert all(pictures.captions[image_id] in captions for image_id, captions in unseen.items())
    assert all(file.path.is_file() for file in pictures.files)


def test_each_question_knows_the_one_right_picture(pictures):
    images, texts = (found := pictures.questions(WordOverlap(pictures.described)))[:-1], found[-1]

    assert [pictures.captions[question.right] for question in images] == [question.text for question in images]
    assert texts.right == texts.image_id
    assert {option.name.rsplit("-", 1)[0] for option in texts.options} == {"test-1-0"}
    assert len(texts.options) == 4


def test_scenes_and_confusers_both_have_queries():
    asked = range(0, NUM_PICTURES, QUERY_EVERY)

    assert len(asked) == 40
    assert [sum(number % 4 == member for number in asked) for member in range(4)] == [10] * 4


def test_the_vectors_of_the_checkpoint_find_candidates(pictures, checkpoint):
    paths = {file.image_id: file.path for file in pictures.files}

    stage = VectorIndex.load(checkpoint, pooled_here(checkpoint, paths))
    question, *_, texts = pictures.questions(stage)

    scores = [option.score for option in question.options]
    assert scores == sorted(scores, reverse=True)
    assert all(-1.001 <= score <= 1.001 for score in scores)
    assert [name for name, _ in stage.images(question.text, 3)] == [option.name for option in question.options[:3]]
    assert len(texts.options) == 4


def test_a_picture_is_pooled_here_as_the_model_pools_it(pictures, checkpoint):
    file = pictures.files[0]
    size = VARIANTS["tiny"].preprocess.image_size
    with Image.open(file.path) as image:
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)

    found = pooled_here(checkpoint, {file.image_id: file.path})

    with torch.inference_mode():
        expected = load_checkpoint(checkpoint).model.encode_images(torch.tensor(pixels)[None])[1][0]
    np.testing.assert_allclose(found[file.image_id], expected.numpy(), atol=1e-5)


def test_an_empty_variable_counts_as_not_set(monkeypatch, checkpoint):
    monkeypatch.setattr(demo_choices, "SHIPPED", checkpoint)

    choices = Choices.of({"IMAGES": "", "CHECKPOINT": "", "REDIS_URL": "redis://here"})

    assert choices == Choices(has_own_redis=True)
    assert choices.checkpoint == checkpoint
    assert choices.is_checked()


@pytest.mark.parametrize(
    ("environment", "caveat", "searches_vectors", "is_checked"),
    [
        ({}, None, True, True),
        ({"IMAGES": "here"}, PHOTOGRAPHS, False, False),
        ({"CHECKPOINT": "trained"}, None, True, False),
        ({"IMAGES": "here", "CHECKPOINT": "trained"}, None, True, False),
        ({"IMAGES": "here", "CHECKPOINT": "untrained"}, UNTRAINED, False, False),
    ],
)
def test_the_choices_decide_the_first_stage_the_check_and_the_caveat(
    monkeypatch, checkpoint, tmp_path, environment, caveat, searches_vectors, is_checked
):
    write_untrained(VARIANTS["tiny"], tmp_path / "untrained", seed=0)
    config = Path(shutil.copytree(checkpoint, tmp_path / "trained")) / "config.json"
    config.write_text(config.read_text().replace('"trained": false', '"trained": true'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_choices, "SHIPPED", tmp_path / "trained")

    choices = Choices.of(environment)

    assert choices.caveat() is caveat
    assert choices.searches_vectors() == searches_vectors
    assert choices.is_checked() == is_checked


def test_an_invalid_checkpoint_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointMissing, match="nowhere"):
        Choices.of({"CHECKPOINT": str(tmp_path / "nowhere")}).config()

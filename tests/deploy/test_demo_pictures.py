"""What the demo shows and asks: drawn scenes or a folder of one's own, and who finds the candidates."""

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
from demo_pictures import caption_of, pictures_in
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
    """Three groups of four."""
    return drawn_scenes(tmp_path_factory.mktemp("scenes") / "new", num_pictures=12, size=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Untrained, with a first stage."""
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


def test_a_folder_of_ones_own_gives_captions_and_queries_and_nobody_knows_the_answers(tmp_path):
    for name in ("red-cup.jpg", "black cat.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    pictures = pictures_in(tmp_path)
    questions = pictures.questions(WordOverlap(pictures.described))

    assert sorted(pictures.captions.values()) == ["black cat", "red cup"]
    assert [(question.text, question.options[0].caption) for question in questions[:2]] == [
        ("black cat", "black cat"),
        ("red cup", "red cup"),
    ]
    assert [question.right for question in questions] == [None] * 3
    assert questions[2].picture == tmp_path / "black cat.jpg"


def test_a_folder_without_pictures_is_a_sentence(tmp_path):
    with pytest.raises(ServiceError, match="holds 0 image files; the demo needs at least 2"):
        pictures_in(tmp_path)


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


def test_scenes_and_confusers_are_asked_for_alike():
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


def test_what_is_set_to_nothing_is_not_chosen(monkeypatch, checkpoint):
    monkeypatch.setattr(demo_choices, "SHIPPED", checkpoint)

    choices = Choices.of({"IMAGES": "", "CHECKPOINT": "", "REDIS_URL": "redis://here"})

    assert choices == Choices(images=None, own_checkpoint=None, has_own_kafka=False, has_own_redis=True)
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
def test_what_follows_from_the_choices(
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


def test_a_checkpoint_that_is_none_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointMissing, match="nowhere"):
        Choices.of({"CHECKPOINT": str(tmp_path / "nowhere")}).config()

"""What is judged: the checkpoint's own first stage, images seen once for all models of a tower, some captions only."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from edje.checkpoint import CheckpointMissing, read_tokenizer_json
from edje.data.spec import ScenesSpec, open_dataset
from edje.evaluate import evaluate_subject
from edje.evaluation.errors import SubjectUnusable
from edje.evaluation.subject import load_subject
from edje.first_stage.dual_encoder import (
    FirstStageModel,
    FirstStageModelConfig,
    draw_first_stage,
    load_first_stage,
    save_first_stage,
)
from edje.init import initialise
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint, save_checkpoint
from edje.text import Tokenizer

TINY = VARIANTS["tiny"]
SIZE = TINY.preprocess.image_size


class NotedPictures:
    """The pictures of another dataset, and how each was asked for."""

    def __init__(self, source):
        self._source = source
        self.asked = []

    def pixels(self, index, size, resample):
        self.asked.append((index, size, resample))
        return self._source.pixels(index, size, resample)


def scenes():
    dataset = open_dataset(ScenesSpec(kind="scenes", test_groups=2), "test", strict=True)
    return replace(dataset, source=NotedPictures(dataset.source))


def checkpoint_in(folder, config=TINY, seed=0, first_stage_layers=1):
    """A model with random weights, and a first stage with random weights where one is wanted."""
    initialise(config, folder, seed=seed)
    if first_stage_layers is not None:
        model = FirstStageModel(
            FirstStageModelConfig(
                dim=8,
                vocab_size=config.joint.vocab_size,
                image_dim=config.vision.pooled_dim,
                text_dim=16,
                num_layers=first_stage_layers,
                max_positions=config.preprocess.max_text_tokens,
            )
        )
        draw_first_stage(model, seed)
        save_first_stage(folder, model.eval())
    return folder


@pytest.fixture
def load(tmp_path):
    def quietly(checkpoint, dataset, storage="none", **options):
        return load_subject(
            checkpoint, dataset, "test", storage, features=tmp_path / "features",
            console=Console(file=io.StringIO()), **options,
        )  # fmt: skip

    return quietly


@pytest.mark.parametrize("layers", [0, 1])
def test_the_first_stage_of_the_checkpoint_compares_captions_with_what_the_tower_pools(load, tmp_path, layers):
    checkpoint, dataset = checkpoint_in(tmp_path / "model", first_stage_layers=layers), scenes()
    tokenizer = Tokenizer.load(checkpoint)
    model = load_checkpoint(checkpoint).model
    pixels = torch.from_numpy(np.stack([dataset.pixels(number, SIZE) for number in range(8)]))
    visual, pooled = model.encode_images(pixels)

    subject = load(checkpoint, dataset)

    assert subject.first_stage == "checkpoint"
    assert subject.similarity.shape == (40, 8)
    first_stage = load_first_stage(checkpoint)
    images = first_stage.image_vectors(pooled.numpy())
    for number in (0, 7, 39):
        ids = torch.tensor([tokenizer.encode(subject.captions[number])])
        text = first_stage.embed_texts(ids, torch.tensor([ids.shape[1]])).numpy()
        # What the tower sees is kept in half precision.
        assert subject.similarity[number] == pytest.approx((text @ images.T)[0], abs=2e-3)
    assert subject.stored.tokens == pytest.approx(visual.numpy(), abs=2e-2)


def test_a_second_model_over_the_same_tower_looks_at_no_picture(load, tmp_path):
    dataset = scenes()
    loaded = load_checkpoint(checkpoint_in(tmp_path / "one"))
    with torch.no_grad():
        for parameter in loaded.model.joint.parameters():
            parameter.mul_(1.1)
    save_checkpoint(tmp_path / "two", loaded.config, loaded.model, read_tokenizer_json(tmp_path / "one"))
    save_first_stage(tmp_path / "two", load_first_stage(tmp_path / "one"))
    one = load(tmp_path / "one", dataset)
    num_asked = len(dataset.source.asked)

    two = load(tmp_path / "two", dataset)

    assert len(dataset.source.asked) == num_asked == 8
    assert two.model_digest != one.model_digest
    assert (two.similarity == one.similarity).all()


def test_pictures_are_resampled_as_the_model_was_trained(load, tmp_path):
    dataset = scenes()
    bicubic = replace(TINY, preprocess=replace(TINY.preprocess, resample="bicubic"))

    load(checkpoint_in(tmp_path / "model", bicubic), dataset)

    assert set(dataset.source.asked) == {(number, SIZE, "bicubic") for number in range(8)}


@pytest.mark.parametrize("storage", ["fp16", "bf16", "int8", "int4"])
def test_the_first_stage_does_not_depend_on_the_storage(load, tmp_path, storage):
    checkpoint, dataset = checkpoint_in(tmp_path / "model"), scenes()

    exact, stored = load(checkpoint, dataset), load(checkpoint, dataset, storage)

    assert (exact.similarity == stored.similarity).all()
    assert len(stored.stored.blobs) == 8


def test_a_checkpoint_without_a_first_stage_is_told_before_a_picture_is_looked_at(load, tmp_path):
    dataset = scenes()

    with pytest.raises(CheckpointMissing, match="has no first stage"):
        load(checkpoint_in(tmp_path / "model", first_stage_layers=None), dataset)

    assert dataset.source.asked == []


def test_a_first_stage_nobody_knows_is_told_with_the_known_ones(load, tmp_path):
    with pytest.raises(SubjectUnusable, match=r"no first stage 'best': choose checkpoint, maxsim, or a \.npy file"):
        load(tmp_path, scenes(), first_stage="best")


# Some captions only


def of_part(subject, num_captions, scorer="torch"):
    with Progress(console=Console(file=io.StringIO())) as bars:
        return evaluate_subject(
            subject, scorer, ("text-to-image", "image-to-text"), [3],
            num_resamples=2, seed=0, bars=bars, num_captions=num_captions,
        )  # fmt: skip


def test_fewer_captions_are_asked_evenly_and_all_images_stay_candidates(load, tmp_path):
    subject = load(checkpoint_in(tmp_path / "model"), scenes())

    report = of_part(subject, 10)

    asked, images = (result.comparison for result in report.results)
    assert (asked.num_queries, asked.num_candidates) == (10, 8)
    assert (images.num_queries, images.num_candidates) == (8, 40)
    assert report.data == "scenes test, 10 of 40 captions asked"
    own = subject.similarity[np.arange(40), subject.image_of_caption]
    ranks = (subject.similarity > own[:, None]).sum(axis=1)
    assert asked.row("R@1").first_stage.value == pytest.approx((ranks[::4] == 0).mean())


@pytest.mark.parametrize("num_captions", [None, 40, 1000])
def test_all_captions_are_asked_where_that_is_not_more_than_is_wanted(load, tmp_path, num_captions):
    subject = load(checkpoint_in(tmp_path / "model"), scenes())

    report = of_part(subject, num_captions)

    assert report.data == "scenes test"
    assert report.results[0].comparison.num_queries == 40


def test_a_part_is_scored_by_the_captions_own_numbers(load, tmp_path):
    subject = load(checkpoint_in(tmp_path / "model"), scenes())
    right = replace(
        subject, scorers={"torch": lambda: lambda c, i: (subject.image_of_caption[c] == i).astype(np.float32)}
    )

    asked = of_part(right, 7).results[0].comparison

    assert asked.row("R@1").reranked.value == asked.row("R@3").first_stage.value

"""Judged pairs as arrays: negatives from lists, and a teacher's scores; trained on in miniature."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from edje.data.dataset import CaptionedImage, Dataset, JudgedPair, Problems
from edje.recipe import RecipeError
from edje.training.batches.corpus import Captions
from edje.training.batches.judged import JudgedPairs
from edje.training.batches.negatives import MISSING, Positives
from training_harness import TINY, metrics, tiny_recipe, train

ONE_PHASE = TINY[: TINY.index('[[phase]]\nname = "see"')] + TINY[TINY.index('[[phase]]\nname = "rank"') :]


def corpus(*judged):
    """Images 0 to 3; image 3 has no caption. Captions: "dog" of 0, "cat" of 1, "Dog!" of 2."""
    texts = [("dog",), ("cat",), ("Dog!",), ()]
    images = tuple(CaptionedImage(f"{number}", captions) for number, captions in enumerate(texts))
    dataset = Dataset("d", images, Problems(), "d", None, judged)
    ids = np.full((3, 3), 5, np.int32)
    captions = Captions(("dog", "cat", "Dog!"), ids, np.full(3, 3), np.arange(3), np.array([0, 1, 0]))
    return JudgedPairs(dataset, captions), Positives(captions.keys, captions.images)


def test_negatives_are_the_judged_pairs_that_are_not_positive():
    judged, positives = corpus(
        JudgedPair("dog", "0"), JudgedPair("dog", "3"), JudgedPair("DOG", "1"), JudgedPair("dog", "2"),
        JudgedPair("dog", "1"), JudgedPair("cow", "1"),
    )  # fmt: skip

    sample = judged.sampler(positives, per_sample=2)
    images, captions = sample(np.arange(3), np.arange(3), np.random.default_rng(0))

    assert sorted(images[0].tolist()) == sorted(images[2].tolist()) == [1, 3]
    assert images[1].tolist() == [MISSING, MISSING]
    assert captions.tolist() == [[MISSING] * 2, [0, 0], [MISSING] * 2]


def test_a_teachers_scores_are_found_by_text_and_image():
    judged, _ = corpus(
        JudgedPair("dog", "0", 1.5), JudgedPair("cat", "3", -2.0), JudgedPair("cat", "1"), JudgedPair("dog", "0", 0.5)
    )

    scores = judged.scores(np.array([0, 2, 1, 1]), np.array([0, 0, 3, 1]))

    assert judged.has_scores
    np.testing.assert_array_equal(scores, np.array([0.5, 0.5, -2.0, np.nan], np.float32))
    assert not corpus(JudgedPair("dog", "0"))[0].has_scores


def candidate(number, step):
    return {"image": f"{(number + step) % 24}.png", "score": 3.0 - step, "label": int(step == 0)}


@pytest.fixture
def clicks(tmp_path):
    """Lists of 24 queries, each with one positive image of 24 and two negatives, all with scores."""
    for number in range(24):
        Image.new("RGB", (16, 16), (10 * number,) * 3).save(tmp_path / f"{number}.png")
    lists = [
        {"query": f"shade number {number}", "candidates": [candidate(number, step) for step in range(3)]}
        for number in range(24)
    ]
    (tmp_path / "clicks.jsonl").write_text("\n".join(map(json.dumps, lists)))
    return tmp_path / "clicks.jsonl"


def recipe_on(clicks, folder, *changes):
    data = f'kind = "lists"\nlists_path = "{clicks}"\ndev_share = 0.3\n'
    text = ONE_PHASE.replace('kind = "scenes"\ntrain_groups = 5\ndev_groups = 1\n', data)
    parts = "phase.0.train={vision=1, adapter=1, text=1, meeting=1}"
    phase = ["phase.0.batch_size=4", parts, "phase.0.negatives.source=lists"]
    return tiny_recipe(folder, *phase, *changes, text=text)


def test_a_model_is_trained_on_clicked_lists_with_a_teachers_scores(clicks, tmp_path):
    losses = "phase.0.losses={itm=1, margin_mse=0.1, kl=1, distillation=0.1}"

    train(recipe_on(clicks, tmp_path, losses, "phase.0.epochs=2"), tmp_path / "out")

    first = metrics(tmp_path / "out")[0]
    assert {"itm", "margin_mse", "kl", "distillation"} <= first.keys()
    assert all(np.isfinite(first[name]) and first[name] > 0 for name in ("itm", "margin_mse", "kl"))


def test_a_loss_of_a_teacher_without_scores_is_refused(clicks, tmp_path):
    content = clicks.read_text().replace('"score"', '"other"')
    clicks.write_text(content)

    with pytest.raises(RecipeError, match="the loss 'kl' needs a teacher: set `teacher`"):
        train(recipe_on(clicks, tmp_path, "phase.0.losses={kl=1}"), tmp_path / "out")


def test_lists_as_source_of_negatives_need_lists(tmp_path):
    with pytest.raises(RecipeError, match=r"negatives\.source = 'lists' needs data with candidate lists"):
        train(
            tiny_recipe(
                tmp_path,
                "phase.0.train={vision=1, adapter=1, text=1, meeting=1}",
                'phase.0.negatives.source="lists"',
                "phase.0.losses={itm=1}",
                text=ONE_PHASE,
            ),
            tmp_path / "out",
        )

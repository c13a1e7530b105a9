"""Judged lists and labelled tables as datasets: captions, negatives and teacher's scores."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from edje.data.caption_table import caption_table
from edje.data.concatenated import concatenate
from edje.data.dataset import DataError, JudgedPair
from edje.data.judged_lists import judged_lists
from edje.data.spec import ListsSpec, open_dataset


@pytest.fixture
def root(tmp_path):
    for number in range(6):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"{number}.png")
    return tmp_path


def write(root, *lists):
    (root / "clicks.jsonl").write_text("\n".join(map(json.dumps, lists)))
    return root / "clicks.jsonl"


def image(number, **values):
    return {"image": f"{number}.png", **values}


def read(root, *lists, split="train", **options):
    return judged_lists(write(root, *lists), root, split, dev_share=0.0, test_share=0.0, **options)


DOG = {"query": "a dog", "candidates": [image(0, score=0.3, label=1), image(1, score=0.4), image(2, label=0)]}
CAT = {"query": {"image": "2.png"}, "candidates": [{"text": "a cat", "label": 2}, {"text": "a dog", "score": -1}]}


def test_a_positive_text_is_a_caption_and_every_judged_pair_is_kept(root):
    dataset = read(root, DOG, CAT, strict=True)

    assert {each.image_id: each.captions for each in dataset.images} == {
        "0.png": ("a dog",),
        "1.png": (),
        "2.png": ("a cat",),
    }
    assert dataset.judged == (
        JudgedPair("a dog", "0.png", 0.3),
        JudgedPair("a dog", "1.png", 0.4),
        JudgedPair("a dog", "2.png"),
        JudgedPair("a cat", "2.png"),
        JudgedPair("a dog", "2.png", -1.0),
    )


def test_faults_are_reported_with_file_and_line_and_cost_their_list_or_candidate_alone(root):
    lost = {"query": "a cow", "candidates": [image(9, label=1), image(3, label=1)]}
    unlabelled = {"query": "a bird", "candidates": [image(4), image(5, label=0)]}

    dataset = read(root, DOG, unlabelled, lost)

    assert [each.image_id for each in dataset.images] == ["0.png", "1.png", "2.png", "3.png"]
    report = dataset.problems.report()
    assert "1 list without a positive candidate (clicks.jsonl line 2: a bird)" in report
    assert "1 image whose file is missing (clicks.jsonl line 3: 9.png)" in report
    with pytest.raises(DataError, match="list without a positive candidate"):
        read(root, DOG, unlabelled, strict=True)


def test_lists_are_divided_by_their_query(root):
    lists = [{"query": f"query {number}", "candidates": [image(number % 6, label=1)]} for number in range(60)]
    path = write(root, *lists)

    queries = [
        {text for each in judged_lists(path, root, split).images for text in each.captions}
        for split in ("train", "dev", "test")
    ]

    assert sum(map(len, queries)) == len(set.union(*queries)) == 60
    assert all(queries)
    spec = ListsSpec(kind="lists", lists_path=path)
    assert {text for each in open_dataset(spec, "dev").images for text in each.captions} == queries[1]


def test_judged_pairs_of_several_datasets_keep_their_images(root):
    joined = concatenate({"a": read(root, DOG), "b": read(root, DOG)}, "train")

    assert [pair.image_id for pair in joined.judged] == [f"{part}/{n}.png" for part in "ab" for n in range(3)]


def test_a_table_may_have_scores_and_labels(root):
    (root / "list.csv").write_text(
        "image,caption,teacher_score,label\n"
        "0.png,a dog,2.5,\n"
        "1.png,a dog,-1,0\n"
        "1.png,a cat,,\n"
        "2.png,a cow,many,\n"
        "3.png,a bird,nan,1\n"
        "4.png,a fish,,1\n"
    )

    dataset = caption_table(root / "list.csv", root)

    assert {each.image_id: each.captions for each in dataset.images} == {
        "0.png": ("a dog",),
        "1.png": ("a cat",),
        "4.png": ("a fish",),
    }
    assert dataset.judged == (
        JudgedPair("a dog", "0.png", 2.5),
        JudgedPair("a dog", "1.png", -1.0),
        JudgedPair("a fish", "4.png"),
    )
    assert "list.csv line 5: teacher_score 'many' is not a number" in dataset.problems.report()
    assert dataset.problems.counts["bad_score"] == 2

"""Concatenated datasets: every image keeps its captions, pixels and splits."""

from __future__ import annotations

import tomllib

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from edje.data.concatenated import concatenate
from edje.data.dataset import CaptionedImage, DataError, Dataset, Problems
from edje.data.spec import DataSpec, open_dataset
from edje.evaluation.data_file import read_data_spec


class Grey:
    """Every pixel of image i is `first` + i."""

    def __init__(self, first):
        self._first = first

    def pixels(self, index, size, resample):
        return np.full((3, size, size), self._first + index, np.uint8)


def dataset_of(num_images, first, group=None, problems=()):
    images = tuple(CaptionedImage(f"{number}", (f"shade {first + number}",), group) for number in range(num_images))
    recorded = Problems()
    for kind, name in problems:
        recorded.record(kind, name)
    return Dataset("greys", images, recorded, f"from {first}", Grey(first))


def test_each_image_keeps_its_captions_and_pixels_under_the_name_of_its_part():
    joined = concatenate({"a": dataset_of(3, 10), "b": dataset_of(2, 20, group="g"), "c": dataset_of(1, 30)}, "train")

    assert [image.image_id for image in joined.images] == ["a/0", "a/1", "a/2", "b/0", "b/1", "c/0"]
    assert [image.group for image in joined.images] == [None, None, None, "b/g", "b/g", None]
    shades = [int(joined.pixels(number, 4).min()) for number in range(6)]
    assert shades == [10, 11, 12, 20, 21, 30]
    assert [image.captions for image in joined.images] == [(f"shade {shade}",) for shade in shades]
    assert joined.name == "a + b + c train"


def test_the_faults_of_all_parts_are_counted_and_named_by_part():
    many = [("empty_caption", f"img-{number}") for number in range(7)]
    joined = concatenate(
        {"a": dataset_of(1, 0, problems=many), "b": dataset_of(1, 0, problems=[("bad_row", "line 3")])}, "train"
    )

    assert joined.problems.counts == {"empty_caption": 7, "bad_row": 1}
    assert joined.problems.named("empty_caption")[0] == "a/img-0"
    assert joined.problems.named("bad_row") == ("b/line 3",)


def test_the_fingerprint_changes_with_any_part_and_with_their_order():
    one, other = dataset_of(1, 0), dataset_of(1, 1)

    fingerprints = {
        concatenate(parts, "train").fingerprint
        for parts in ({"a": one, "b": other}, {"b": other, "a": one}, {"a": one}, {"a": one, "b": one})
    }

    assert len(fingerprints) == 4


def test_a_split_without_any_dataset_is_refused():
    with pytest.raises(DataError, match="no dataset has images for dev"):
        concatenate({}, "dev")


@pytest.fixture
def file(tmp_path):
    """A table with splits and one without, and a file that joins them; its paths are its own folder's."""
    (tmp_path / "pictures").mkdir()
    for name in ("one", "two", "three"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "split.csv").write_text("image,caption,split\none.png,a dog,train\ntwo.png,a cat,dev\n")
    (tmp_path / "more.csv").write_text("image,caption\nthree.png,a bird\n")
    (tmp_path / "data.toml").write_text(
        """
        [data]
        kind = "several"
        train_only = ["web"]
        [data.parts.good]
        kind = "table"
        csv_path = "split.csv"
        image_root = "pictures"
        [data.parts.web]
        kind = "table"
        csv_path = "more.csv"
        image_root = "pictures"
        whole = true
        """
    )
    return tmp_path / "data.toml"


def test_a_part_for_training_alone_is_in_no_other_split(file):
    spec = read_data_spec(file)

    train, dev = (open_dataset(spec, split, strict=True) for split in ("train", "dev"))

    assert [image.image_id for image in train.images] == ["good/one.png", "web/three.png"]
    assert [image.image_id for image in dev.images] == ["good/two.png"]


@pytest.mark.parametrize(
    ("change", "words"),
    [("train_only = ['books']", "names 'books', but the parts are good"), ("parts = {}", "at least 1 item")],
)
def test_an_unknown_or_missing_part_is_refused(change, words):
    table = {"kind": "several", "parts": {"good": {"kind": "scenes"}}} | tomllib.loads(change)

    with pytest.raises(ValidationError, match=words):
        TypeAdapter(DataSpec).validate_python(table)

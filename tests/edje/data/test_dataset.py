"""Readers of image lists: problems are counted and named with file and line, and no other item is lost."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from edje.data.caption_table import caption_table
from edje.data.dataset import PROBLEM_KINDS, DataError, Problems, decode_images
from edje.data.flickr8k import flickr8k
from edje.data.karpathy import karpathy
from edje.data.spec import DataSpec, Flickr8kSpec, KarpathySpec, ScenesSpec, TableSpec, open_dataset
from edje.images import ImageError

ROOT = Path(__file__).parents[3]
REAL_FLICKR8K = Path(os.environ.get("EDJE_FLICKR8K", ROOT.parent / "shared" / "data" / "flickr8k"))

SHADES = {"a.png": 10, "b.png": 20, "c.png": 30, "sub/d.png": 40}


@pytest.fixture
def root(tmp_path):
    """A folder of four grey images of different shades, and one image outside the folder."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, shade in SHADES.items():
        Image.new("RGB", (8, 8), (shade,) * 3).save(folder / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    return folder


class Layout:
    """One list format. `write` takes (image, caption, split), `read` returns the dataset."""

    def __init__(self, kind, root):
        self.kind = kind
        self.root = root
        self.folder = root.parent

    def write(self, *rows):
        getattr(self, f"_write_{self.kind}")(rows)
        return self

    def read(self, split="train", **options):
        if self.kind == "karpathy":
            return karpathy(self.folder / "list.json", self.root, split, **options)
        if self.kind == "table":
            return caption_table(self.folder / "list.csv", self.root, split, **options)
        return flickr8k(self.folder, split, **options)

    def _write_karpathy(self, rows):
        images = {}
        for image, caption, split in rows:
            entry = images.setdefault(image, karpathy_entry(image, split=split, captions=[]))
            entry["sentences"].append({"raw": caption, "tokens": caption.split()})
        write_json(self.folder / "list.json", list(images.values()))

    def _write_table(self, rows):
        with (self.folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "caption", "split"), *rows])

    def _write_flickr8k(self, rows):
        text = self.folder / "text"
        text.mkdir(exist_ok=True)
        for split in ("train", "dev", "test"):
            names = dict.fromkeys(image for image, _, each in rows if each == split)
            (text / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\r\n" for name in names))
        lines = [f"{image}#{number}\t{caption}\n" for number, (image, caption, _) in enumerate(rows)]
        (text / "Flickr8k.token.txt").write_text("".join(lines))


def karpathy_entry(image, split="train", captions=("a dog",), **more):
    split = {"dev": "val"}.get(split, split)
    return {"filename": image, "split": split, "sentences": [{"raw": caption} for caption in captions], **more}


def write_json(path, images):
    path.write_text(json.dumps({"dataset": "mine", "images": images}))
    return path


@pytest.fixture(params=["karpathy", "table", "flickr8k"])
def layout(request, root):
    return Layout(request.param, root)


def shade(dataset, index):
    return int(dataset.pixels(index, 4)[0, 0, 0])


# ---- every reader


def test_a_split_has_its_images_in_order_with_their_captions_and_pixels(layout):
    layout.write(
        ("b.png", "one", "train"), ("a.png", "two", "test"), ("b.png", "three", "train"), ("c.png", "4", "dev")
    )

    train, dev, test = (layout.read(split, strict=True) for split in ("train", "dev", "test"))

    assert [(image.image_id, image.captions) for image in train.images] == [("b.png", ("one", "three"))]
    assert [image.image_id for image in (*dev.images, *test.images)] == ["c.png", "a.png"]
    assert (shade(train, 0), shade(dev, 0), shade(test, 0)) == (20, 30, 10)
    assert train.pixels(0, 6).shape == (3, 6, 6)
    assert not train.problems
    assert "1 images, 2 captions. No problems." in train.summary()


HOSTILE = {
    "missing_image": ("gone.png", "a dog"),
    "outside_root": ("../outside.png", "a dog"),
    "no_caption": ("b.png", " . "),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_faulty_image_is_left_out_counted_and_named(layout, kind):
    image, caption = HOSTILE[kind]
    layout.write(("a.png", "a cat", "train"), (image, caption, "train"), ("c.png", "a cow", "train"))

    dataset = layout.read()

    assert [image.image_id for image in dataset.images] == ["a.png", "c.png"]
    assert [shade(dataset, 0), shade(dataset, 1)] == [10, 30]
    assert dataset.problems.counts[kind] == 1
    assert dataset.problems.named(kind) == (image,)
    assert f"1 {PROBLEM_KINDS[kind][0]}" in dataset.summary()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_strict_reader_stops_at_any_fault_and_names_it(layout, kind):
    image, caption = HOSTILE[kind]
    layout.write(("a.png", "a cat", "train"), (image, caption, "train"))

    with pytest.raises(DataError, match=rf"1 {PROBLEM_KINDS[kind][0]} \(.*{image}\)"):
        layout.read(strict=True)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../../../../../etc/passwd", "sub/../../outside.png", "link.png", "linked/outside.png"]
)
def test_nothing_outside_the_image_folder_is_opened(layout, name):
    (layout.root / "link.png").symlink_to(layout.folder / "outside.png")
    (layout.root / "linked").symlink_to(layout.folder)
    layout.write(("a.png", "a cat", "train"), (name, "a secret", "train"))

    dataset = layout.read()

    assert [image.image_id for image in dataset.images] == ["a.png"]
    assert dataset.problems.counts == {"outside_root": 1}


@pytest.mark.parametrize("name", ["sub", "pipe", "loop.png", "n" * 5_000, "odd\x00.png", "tab\\t"])
def test_an_image_that_is_not_a_regular_file_is_missing(layout, name):
    os.mkfifo(layout.root / "pipe")
    (layout.root / "loop.png").symlink_to("loop.png")
    layout.write(("a.png", "a cat", "train"), (name, "a dog", "train"))

    dataset = layout.read()

    assert [image.image_id for image in dataset.images] == ["a.png"]
    assert dataset.problems.counts == {"missing_image": 1}


def test_links_within_the_image_folder_and_to_it_are_followed(layout):
    (layout.root / "link.png").symlink_to("b.png")
    link_to_root = layout.folder / "linked-images"
    layout.root.rename(link_to_root)
    layout.root.symlink_to(link_to_root)
    layout.write(("link.png", "a cat", "train"))

    assert shade(layout.read(strict=True), 0) == 20


def test_a_file_with_two_names_is_added_once(layout):
    layout.write(("a.png", "a cat", "train"), ("./a.png", "a dog", "train"))

    dataset = layout.read()

    assert [image.captions for image in dataset.images] == [("a cat",)]
    assert dataset.problems.named("duplicate_id") == ("./a.png",)


def test_an_empty_caption_is_left_out_and_its_image_kept(layout):
    layout.write(("a.png", "a cat", "train"), ("a.png", "", "train"), ("a.png", "?!", "train"))

    dataset = layout.read()

    assert dataset.images[0].captions == ("a cat",)
    assert dataset.problems.counts == {"empty_caption": 2}


def test_a_caption_of_10_000_words_is_kept_whole_and_counted(layout):
    caption = " ".join(["word"] * 10_000)
    layout.write(("a.png", caption, "train"))

    dataset = layout.read()

    assert dataset.images[0].captions == (caption,)
    assert dataset.problems.counts == {"long_caption": 1}
    assert dataset.problems.report().startswith("Kept: 1 caption so long")
    with pytest.raises(DataError, match="caption so long"):
        layout.read(strict=True)


def test_a_caption_may_be_in_any_language_and_hold_any_mark(layout):
    caption = 'Ein Hund, "Rex", läuft; 一只狗 🐕 <b>[SEP]</b>'
    layout.write(("a.png", caption, "train"))

    assert layout.read(strict=True).images[0].captions == (caption,)


def test_a_dataset_without_a_usable_image_is_refused(layout):
    layout.write(("gone.png", "a cat", "train"))

    with pytest.raises(
        DataError,
        match=r"no usable image\. Left out: 1 image whose file is missing \(.*gone\.png\)\. File names are relative to",
    ):
        layout.read()


def test_a_list_without_entries_is_refused(layout):
    layout.write()

    with pytest.raises(DataError, match="has no images: the list has no entry for it"):
        layout.read()


def test_a_missing_image_folder_is_refused(layout):
    layout.write(("a.png", "a cat", "train"))
    layout.root.rename(layout.folder / "elsewhere")

    with pytest.raises(DataError, match="is not a folder: name the folder with the images"):
        layout.read()


def test_a_missing_list_is_refused(layout):
    with pytest.raises(DataError, match="name an existing file of captions"):
        layout.read()


def test_a_list_that_is_not_utf_8_is_refused(layout):
    layout.write(("a.png", "a CAFE", "train"))
    for path in (*layout.folder.glob("list.*"), *layout.folder.glob("text/*.token.txt")):
        path.write_bytes(path.read_bytes().replace(b"CAFE", "café".encode("latin-1")))

    with pytest.raises(DataError, match=r"line \d+ is not UTF-8 \(byte 0xe9\)|not a complete JSON"):
        layout.read()


def test_a_list_of_captions_of_more_than_a_gigabyte_is_refused(layout):
    layout.write(("a.png", "a cat", "train"))
    for path in (*layout.folder.glob("list.*"), *layout.folder.glob("text/*")):
        with path.open("r+b") as file:
            file.truncate((1 << 30) + 1)  # a hole: takes no room on the disk

    with pytest.raises(DataError, match="a list of captions has at most"):
        layout.read()


# ---- the fingerprint


def test_the_fingerprint_depends_on_the_files_and_not_on_captions(layout):
    before = layout.write(("a.png", "a cat", "train"), ("b.png", "a dog", "train")).read()
    after = layout.write(("a.png", "another", "train"), ("b.png", "words", "train")).read()

    assert before.fingerprint == after.fingerprint
    assert len(before.fingerprint) == 16


def test_the_fingerprint_changes_with_a_file_an_id_or_the_order(layout):
    def fingerprint(*names):
        return layout.write(*((name, "a cat", "train") for name in names)).read().fingerprint

    found = [fingerprint("a.png", "b.png"), fingerprint("b.png", "a.png"), fingerprint("a.png", "c.png")]
    Image.new("RGB", (9, 9)).save(layout.root / "b.png")
    found.append(fingerprint("a.png", "b.png"))

    assert len(set(found)) == 4


# ---- images that cannot be decoded


@pytest.fixture
def with_broken(layout):
    (layout.root / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnot much of a picture")
    layout.write(*((name, "a cat", "train") for name in ("a.png", "b.png", "c.png")))
    return layout.read(strict=True)


def test_an_image_that_cannot_be_decoded_is_left_out_counted_and_named(with_broken):
    found = list(decode_images(with_broken, 4, with_broken.problems.record))

    assert [(index, int(pixels[0, 0, 0])) for index, pixels in found] == [(0, 10), (2, 30)]
    assert with_broken.problems.named("undecodable_image") == ("b.png",)


def test_an_image_that_cannot_be_decoded_stops_a_strict_reader(with_broken):
    problems = Problems()

    with pytest.raises(DataError, match=r"image b\.png \(2 of 3\) cannot be decoded"):
        list(decode_images(with_broken, 4, problems.record, strict=True))

    assert problems.counts == {"undecodable_image": 1}


def test_a_file_that_was_removed_is_an_image_that_cannot_be_decoded(root):
    dataset = Layout("table", root).write(("a.png", "a cat", "train")).read()
    (root / "a.png").unlink()

    with pytest.raises(ImageError, match="cannot be read"):
        dataset.pixels(0, 4)
    assert list(decode_images(dataset, 4, dataset.problems.record)) == []


# ---- Karpathy's JSON


def test_coco_images_have_subfolders_and_restval_is_for_training(root):
    path = write_json(
        root.parent / "dataset_coco.json",
        [karpathy_entry("a.png"), karpathy_entry("d.png", split="restval", filepath="sub", cocoid=7, imgid=1)],
    )

    assert [image.image_id for image in karpathy(path, root, "train", strict=True).images] == ["a.png", "sub/d.png"]
    assert [image.image_id for image in karpathy(path, root, "train", restval=False).images] == ["a.png"]
    assert shade(karpathy(path, root, "train"), 1) == 40


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"images": [{"filename": "a.png"', "[]", "null", '{"images": 3}', '{"images": null}', "[" * 100_000],
)
def test_a_truncated_file_or_another_json_is_refused(root, text):
    path = root.parent / "list.json"
    path.write_text(text)

    with pytest.raises(DataError, match=r"copy it again|name a file in Karpathy's layout"):
        karpathy(path, root, "train")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "a.png",
        {},
        {"filename": "b.png"},
        {"filename": 3, "split": "train", "sentences": []},
        {"filename": "b.png", "split": "train", "sentences": {"raw": "a dog"}},
        {"filename": "b.png", "split": "train", "sentences": [{"raw": None}]},
        {"filename": "b.png", "split": None, "sentences": []},
        {"filename": "b.png", "split": "train", "sentences": [], "imgid": "x"},
    ],
)
def test_an_entry_of_the_wrong_type_is_counted_with_its_number(root, entry):
    path = write_json(root.parent / "list.json", [karpathy_entry("a.png"), entry])

    dataset = karpathy(path, root, "train")

    assert [image.image_id for image in dataset.images] == ["a.png"]
    assert dataset.problems.counts == {"bad_row": 1}
    assert "list.json entry 1: " in dataset.problems.report()


@pytest.mark.parametrize(("second", "more"), [("a.png", {}), ("b.png", {"imgid": 5})])
def test_an_id_that_occurred_before_in_any_split_is_left_out(root, second, more):
    entries = [karpathy_entry("a.png", imgid=5), karpathy_entry(second, split="test", **more)]
    path = write_json(root.parent / "list.json", [*entries, karpathy_entry("c.png", split="test")])

    dataset = karpathy(path, root, "test")

    assert [image.image_id for image in dataset.images] == ["c.png"]
    assert dataset.problems.named("duplicate_id") == (second,)
    assert not karpathy(path, root, "train").problems


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["images", "filename", "split", "sentences", "raw", "imgid"]), inner)
        ),
    )
)
@settings(max_examples=25, deadline=None)
def test_any_json_gives_a_dataset_or_a_sentence(tmp_path_factory, document):
    folder = tmp_path_factory.mktemp("any")
    (folder / "list.json").write_text(json.dumps(document))

    with pytest.raises(DataError):
        karpathy(folder / "list.json", folder, "train")


# ---- tables


def table(root, text, encoding="utf-8", **options):
    path = root.parent / "list.csv"
    path.write_bytes(text.encode(encoding))
    return caption_table(path, root, **options)


def ids(dataset):
    return [image.image_id for image in dataset.images]


@pytest.mark.parametrize(
    "text",
    [
        "image,caption\na.png,a cat\n",
        "\ufeffimage,caption\r\na.png,a cat\r\n",
        "image,caption\ra.png,a cat\r",
        "caption, image ,note\na cat,a.png,first\n\n",
        'image,caption\n"a.png","a cat"',
        "Image,CAPTION\na.png,a cat\n",
        "image;caption\na.png;a cat\n",
        "image\tcaption\na.png\ta cat\n",
        "sep=;\nimage;caption\na.png;a cat\n",
        "\n\nimage,caption\n\na.png,a cat\n,\n",
        "image,caption\n a.png ,a cat\n",
        "note,image,note,caption\n1,a.png,2,a cat\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_table_may_have_any_line_end_delimiter_case_of_its_header_and_further_columns(root, text, encoding):
    if encoding == "utf-16":
        text = text.removeprefix("\ufeff")

    dataset = table(root, text, encoding, strict=True)

    assert [(image.image_id, image.captions) for image in dataset.images] == [("a.png", ("a cat",))]


@pytest.mark.parametrize("name", ["{root}/sub/d.png", "sub\\d.png", "./sub/d.png", "sub/../sub/d.png"])
def test_an_image_may_be_named_by_an_absolute_path_or_with_backslashes(root, name):
    dataset = table(root, f"image,caption\n{name.format(root=root)},a cat\n", strict=True)

    assert shade(dataset, 0) == 40


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("b.png", "1 fields where the header names 2"),
        ("b.png,a dog,extra", "3 fields where the header names 2"),
        (",a dog", "the column image is empty"),
        ('b.png,"a dog" barks', "a quoted field contains a single quotation mark: double it"),
        (f'b.png,"{"w" * 200_000}"', "a field has more than 131,072 characters"),
        ('b.png,"a dog', "a quotation mark opens a field and does not close it in the same row"),
        ('"b.png,a dog', "a quotation mark opens a field and does not close it in the same row"),
    ],
)
def test_a_bad_row_is_reported_with_file_line_and_cause_and_no_other_row_is_lost(root, row, cause):
    dataset = table(root, f'image,caption\na.png,a cat\n{row}\nc.png,a cow\nsub/d.png,"a bird, sitting"\n')

    assert ids(dataset) == ["a.png", "c.png", "sub/d.png"]
    assert dataset.problems.counts == {"bad_row": 1}
    assert f"1 row that cannot be read (list.csv line 3: {cause}" in dataset.problems.report()


@pytest.mark.parametrize("tail", ["\n", 'c.png,a cow"\n', 'c.png,"a cow"\n', 'c.png,a cow\nsub/d.png,a "bird"\n', ""])
def test_a_stray_quotation_mark_costs_one_row_wherever_the_next_one_is(root, tail):
    dataset = table(root, f'image,caption\na.png,a cat\nb.png,"a dog\n{tail}')

    assert dataset.problems.counts == {"bad_row": 1}
    assert "list.csv line 3: a quotation mark opens a field" in dataset.problems.report()
    assert len(dataset.images) == 1 + tail.count("png")


def test_a_stray_quotation_mark_in_the_middle_of_forty_rows_costs_one_row(root):
    for number in range(40):
        Image.new("RGB", (8, 8), (number,) * 3).save(root / f"{number}.png")
    rows = [f"{number}.png,caption {number},train" for number in range(40)]
    rows[2] = rows[2].replace(",caption", ',"caption')

    dataset = table(root, "\n".join(["image,caption,split", *rows]), split="train")

    assert len(dataset.images) == 39
    assert "(list.csv line 4: a quotation mark" in dataset.problems.report()


def test_a_quoted_caption_may_contain_line_breaks_and_the_lines_after_it_keep_their_numbers(root):
    dataset = table(root, 'image,caption\na.png,"a cat,\nasleep"\ngone.png,a dog\n')

    assert dataset.images[0].captions == ("a cat,\nasleep",)
    assert "list.csv line 4: gone.png" in dataset.problems.report()


@given(st.text(alphabet='ab,;"\n\r\t\ufeffé', max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_is_read_to_its_last_line(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("any")
    Image.new("RGB", (4, 4)).save(folder / "last.png")

    dataset = table_in(folder, f"image,caption\n{text}\nlast.png,a cat\n")

    assert [image.image_id for image in dataset.images] == ["last.png"]


def table_in(folder, text):
    (folder / "list.csv").write_bytes(text.encode())
    return caption_table(folder / "list.csv", folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the header names nothing"),
        ("\n", "the header names nothing"),
        ("a.png,a cat\n", r"line 1: the header names 'a\.png,a cat'\. It must name the columns image and caption"),
        ("\nimage,text\na.png,a cat\n", "line 2: the header names 'image,text'"),
        ('image,"caption\na.png,a cat\n', "It must name the columns image and caption"),
        ("image,caption,Caption\n", "line 1: the header names the column caption more than once"),
        ("image,split,caption,split\n", "line 1: the header names the column split more than once"),
    ],
)
def test_a_table_without_its_two_columns_is_refused(root, text, words):
    with pytest.raises(DataError, match=words):
        table(root, text)


def test_an_address_instead_of_a_file_is_reported_as_such(root):
    dataset = table(root, "image,caption\na.png,a cat\nhttps://images.example/b.png,a dog\n")

    assert "1 web address instead of an image file (list.csv line 3: https" in dataset.problems.report()


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Train", "train"), ("training", "train"), (" TRAIN ", "train"), ("dev", "dev"),
     ("val", "dev"), ("Validation", "dev"), ("valid", "dev"), ("test", "test"), ("Testing", "test")],
)  # fmt: skip
def test_the_usual_names_of_splits_are_understood(root, name, split):
    dataset = table(root, f"image,caption,split\na.png,a cat,{name}\n", split=split, strict=True)

    assert ids(dataset) == ["a.png"]


@pytest.mark.parametrize("name", ["holdout", "", "1", "trainval"])
def test_an_unknown_split_is_reported_with_its_line_and_the_known_ones(root, name):
    dataset = table(root, f"image,caption,split\na.png,a cat,train\nb.png,a dog,{name}\n", split="train")

    assert (
        f"1 row with an unknown split (list.csv line 3: {name!r} is not one of train, training, dev, val, valid, "
        "validation, test, testing)"
    ) in dataset.problems.report()


def test_a_split_without_rows_is_refused_with_the_splits_that_have_some(root):
    text = "image,caption,split\na.png,a cat,train\nb.png,a dog,Train\nc.png,a cow,test\n"

    with pytest.raises(DataError, match=r"no row for the split dev, but 1 for test, 2 for train: name the split dev"):
        table(root, text, split="dev")


def test_a_table_without_splits_is_divided_by_image_and_the_same_way_whatever_else_it_lists(root):
    for number in range(60):
        Image.new("RGB", (4, 4), (number,) * 3).save(root / f"{number}.png")
    rows = [f"{number}.png,caption {number % 7}" for number in range(60)] * 2

    def splits(rows):
        text = "\n".join(["image,caption", *rows])
        return {split: ids(table(root, text, split=split, strict=True)) for split in ("train", "dev", "test")}

    found, fewer = splits(rows), splits(rows[:40])

    assert sorted([*found["train"], *found["dev"], *found["test"]]) == sorted(f"{number}.png" for number in range(60))
    assert len(found["train"]) > 40
    assert found["dev"]
    assert found["test"]
    assert all(set(fewer[split]) == {name for name in found[split] if int(name[:-4]) < 40} for split in found)
    assert len(table(root, "image,caption\na.png,a cat\n").images) == 1


def test_a_table_too_small_to_be_divided_says_what_to_do(root):
    with pytest.raises(DataError, match="add a column split, or raise dev_share and test_share"):
        table(root, "image,caption\na.png,a cat\n", split="test", test_share=0.0)


@pytest.mark.parametrize("how", ["id", "digest", "both"])
def test_images_on_a_list_are_left_out_by_id_or_by_content(root, how):
    digest = hashlib.sha256((root / "b.png").read_bytes()).hexdigest()
    lines = {"id": "b.png\n", "digest": f"\n{digest.upper()}  elsewhere/1.png\n", "both": f"b.png\n{digest}\n"}[how]
    (root.parent / "leave_out.txt").write_text(lines)
    text = "image,caption\na.png,a cat\nb.png,a dog\nc.png,a cow\n"

    dataset = table(root, text, leave_out=root.parent / "leave_out.txt", strict=True)

    assert ids(dataset) == ["a.png", "c.png"]
    assert "1 image on the list of images to leave out (list.csv line 3: b.png)" in dataset.problems.report()


def test_a_missing_list_of_images_to_leave_out_is_refused(root):
    with pytest.raises(DataError, match=r"leave_out\.txt cannot be read"):
        table(root, "image,caption\na.png,a cat\n", leave_out=root.parent / "leave_out.txt")


def test_every_reader_of_files_can_leave_images_out(root):
    (root.parent / "leave_out.txt").write_text("a.png\n")
    listed = (
        Layout("karpathy", root).write(("a.png", "a cat", "train"), ("b.png", "a dog", "train")).folder / "list.json"
    )
    spec = KarpathySpec(kind="karpathy", json_path=listed, image_root=root, leave_out=root.parent / "leave_out.txt")

    assert ids(open_dataset(spec, "train")) == ["b.png"]


def test_an_image_in_two_splits_stays_in_the_first(root):
    text = "image,caption,split\na.png,one,train\na.png,two,test\nb.png,three,test\nc.png,four,holdout\n"

    test = table(root, text, split="test")

    assert ids(test) == ["b.png"]
    assert test.problems.counts == {"two_splits": 1, "unknown_split": 1}
    assert "1 image in a second split (list.csv line 3: a.png)" in test.problems.report()


# ---- Flickr8k


def test_a_repeated_caption_id_is_left_out(root):
    layout = Layout("flickr8k", root).write(("a.png", "a cat", "train"))
    with (root.parent / "text" / "Flickr8k.token.txt").open("a") as file:
        file.write("a.png#0\ta cat again\n\na.png no number\nb.png.1#0\tin no split\na.png#1\ta dog\n")

    dataset = layout.read()

    assert dataset.images[0].captions == ("a cat", "a dog")
    assert dataset.problems.counts == {"duplicate_id": 1, "bad_row": 1}
    assert "Flickr8k.token.txt line 4: not of the form" in dataset.problems.report()


@pytest.mark.skipif(
    not (REAL_FLICKR8K / "text").is_dir(), reason=f"no Flickr8k in {REAL_FLICKR8K}: name its folder in EDJE_FLICKR8K"
)
@pytest.mark.parametrize(("split", "num_images"), [("train", 6_000), ("dev", 1_000), ("test", 1_000)])
def test_the_real_flickr8k_has_its_published_sizes_and_no_fault(split, num_images):
    dataset = flickr8k(REAL_FLICKR8K, split, strict=True)

    assert len(dataset.images) == num_images
    assert {len(image.captions) for image in dataset.images} == {5}
    assert dataset.pixels(num_images - 1, 32).std() > 1


# ---- problems


def test_many_problems_of_a_kind_are_all_counted_and_the_first_named():
    problems = Problems()
    for number in range(1_234):
        problems.record("missing_image", f"{number}.png")

    assert problems.named("missing_image") == ("0.png", "1.png", "2.png", "3.png", "4.png")
    assert "1,234 images whose file is missing (0.png, 1.png, 2.png, 3.png, 4.png, …)" in problems.report()


def test_a_hostile_name_cannot_write_to_the_terminal():
    problems = Problems()
    problems.record("missing_image", "\x1b[2J\nfake line" + "x" * 1_000)

    assert problems.report().isprintable()
    assert len(problems.report()) < 300


# ---- specs


def test_a_recipe_names_its_data():
    adapter = TypeAdapter(DataSpec)

    def parsed(text):
        return adapter.validate_python(tomllib.loads(text))

    assert parsed('kind = "flickr8k"\nfolder = "data/f"') == Flickr8kSpec(kind="flickr8k", folder=Path("data/f"))
    assert parsed('kind = "scenes"\ntrain_groups = 9\nswaps = ["place", "size"]').swaps == ("place", "size")
    assert isinstance(parsed('kind = "karpathy"\njson_path = "a.json"\nimage_root = "i"'), KarpathySpec)


@pytest.mark.parametrize(
    "raw",
    [
        {"kind": "coco"},
        {"kind": "flickr8k"},
        {"kind": "scenes", "colour": 1},
        {"kind": "scenes", "confusers": -1},
        {"kind": "scenes", "swaps": ["smell"]},
    ],
)
def test_a_recipe_with_other_fields_is_refused(raw):
    with pytest.raises(ValidationError):
        TypeAdapter(DataSpec).validate_python(raw)


def test_a_spec_opens_its_dataset(root):
    layout = Layout("table", root).write(("a.png", "a cat", "train"), ("gone.png", "a dog", "test"))
    spec = TableSpec(kind="table", csv_path=layout.folder / "list.csv", image_root=root)

    assert open_dataset(spec, "train", strict=True).fingerprint == layout.read().fingerprint
    assert len(open_dataset(spec.model_copy(update={"whole": True}), "dev").images) == 1
    with pytest.raises(DataError):
        open_dataset(spec, "test")
    assert len(open_dataset(ScenesSpec(kind="scenes", dev_groups=2, confusers=1), "dev").images) == 4


def test_a_spec_opens_the_other_layouts_too(root):
    row = ("a.png", "a cat", "train")
    listed = Layout("karpathy", root).write(row).folder / "list.json"
    Layout("flickr8k", root).write(row)
    specs = [KarpathySpec(kind="karpathy", json_path=listed, image_root=root),
             Flickr8kSpec(kind="flickr8k", folder=root.parent)]  # fmt: skip

    assert [open_dataset(spec, "train", strict=True).images[0].captions for spec in specs] == [("a cat",)] * 2


def test_data_is_read_without_torch():
    script = "import sys, edje.data.spec; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_pixels_are_contiguous_bytes(root):
    dataset = Layout("table", root).write(("a.png", "a cat", "train")).read()

    assert dataset.pixels(0, 5).dtype == np.uint8
    assert dataset.pixels(0, 5).flags.c_contiguous

"""Reads Flickr8k as published: a caption file, three image lists and a folder of images."""

from __future__ import annotations

from pathlib import Path

from edje.data.dataset import Dataset, Split
from edje.data.image_files import DatasetBuilder, read_text_list


def flickr8k(folder: Path, split: Split, *, strict: bool = False) -> Dataset:
    """One split: 6,000, 1,000 or 1,000 images with five captions each.

    `folder` contains `text/Flickr8k.token.txt`, `text/Flickr_8k.{train,dev,test}Images.txt` and `images/`. About a
    hundred images of the caption file are in no image list; they are ignored.
    Raises `DataError`. A faulty line is counted and left out, or raises `DataError` if `strict`.
    """
    builder = DatasetBuilder(f"flickr8k {split}", folder / "images")
    list_path, caption_path = folder / "text" / f"Flickr_8k.{split}Images.txt", folder / "text" / "Flickr8k.token.txt"
    taken: set[str] = set()
    for number, line in enumerate(read_text_list(list_path).split("\n"), start=1):
        name = line.strip()
        if name and builder.add_image(name, name, f"{list_path.name} line {number}"):
            taken.add(name)
    seen: set[str] = set()
    for number, line in enumerate(read_text_list(caption_path).split("\n"), start=1):
        location = f"{caption_path.name} line {number}"
        if not line.strip():
            continue
        caption_id, tab, caption = line.partition("\t")
        image_id, hash_sign, _ = caption_id.rpartition("#")
        if not tab or not hash_sign:
            builder.problems.record("bad_row", "not of the form IMAGE#NUMBER, tab, caption", location)
        elif image_id in taken:
            if caption_id in seen:
                builder.problems.record("duplicate_id", caption_id, location)
                continue
            seen.add(caption_id)
            builder.add_caption(image_id, caption, location)
    return builder.finish(strict=strict)

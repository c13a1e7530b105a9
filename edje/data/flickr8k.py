"""Reads Flickr8k as its authors publish it: a file of captions, three lists of images, and a folder of images."""

from __future__ import annotations

from pathlib import Path

from edje.data.dataset import Dataset, Split
from edje.data.image_files import Gathering, read_text_list


def flickr8k(folder: Path, split: Split, *, strict: bool = False) -> Dataset:
    """One split: 6,000, 1,000 or 1,000 images with five captions each.

    `folder` holds `text/Flickr8k.token.txt`, `text/Flickr_8k.{train,dev,test}Images.txt` and `images/`. Images that
    only the file of captions names (about a hundred, one without a file) are in no split and so no fault.
    Raises `DataError`; a faulty line is counted and left out unless `strict`.
    """
    gathering = Gathering(f"flickr8k {split}", folder / "images")
    names = read_text_list(folder / "text" / f"Flickr_8k.{split}Images.txt").split("\n")
    taken = {name for name in map(str.strip, names) if name and gathering.add_image(name, name)}
    seen: set[str] = set()
    for number, line in enumerate(read_text_list(folder / "text" / "Flickr8k.token.txt").split("\n"), start=1):
        if not line.strip():
            continue
        caption_id, tab, caption = line.partition("\t")
        image_id, hash_sign, _ = caption_id.rpartition("#")
        if not tab or not hash_sign:
            gathering.problems.record("bad_row", f"line {number}")
        elif image_id in taken:
            if caption_id in seen:
                gathering.problems.record("duplicate_id", caption_id)
                continue
            seen.add(caption_id)
            gathering.add_caption(image_id, caption)
    return gathering.finish(strict=strict)

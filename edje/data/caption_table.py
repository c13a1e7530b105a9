"""Reads a CSV table of images and captions, the simplest way to bring data of one's own.

    image,caption,split
    beach/1.jpg,a dog runs on a beach,train

The column split may be absent; others are not looked at.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edje.data.dataset import DataError, Dataset, Split
from edje.data.image_files import Gathering, read_text_list

_SPLIT_WORDS: Final[dict[str, Split]] = {"train": "train", "dev": "dev", "val": "dev", "test": "test"}


def caption_table(csv_path: Path, image_root: Path, split: Split | None = None, *, strict: bool = False) -> Dataset:
    """The rows of one split, or all rows where `split` is None. An image has as many captions as it has rows.

    Raises `DataError`; a faulty row is counted and left out unless `strict`.
    """
    reader = csv.DictReader(io.StringIO(read_text_list(csv_path), newline=""), strict=True)
    columns = _columns(csv_path, reader)
    if split is not None and "split" not in columns:
        raise DataError(
            f"{csv_path} has no column split, so nothing says which rows are for {split}: "
            "add the column, or ask for the whole table"
        )
    gathering = Gathering(csv_path.stem if split is None else f"{csv_path.stem} {split}", image_root)
    split_of: dict[str, Split | None] = {}
    taken: dict[str, bool] = {}
    for row in _rows(reader, gathering):
        image, caption = row["image"], row["caption"]
        row_split = _SPLIT_WORDS.get(row["split"].strip()) if "split" in columns else None
        if not image or ("split" in columns and row_split is None):
            gathering.problems.record("bad_row", f"line {reader.reader.line_num}")
            continue
        first_split = split_of.setdefault(image, row_split)
        if split is not None and row_split != split:
            continue
        if row_split != first_split:
            # No image can be both trained on and judged by.
            gathering.problems.record("duplicate_id", image)
            continue
        if image not in taken:
            taken[image] = gathering.add_image(image, image)
        if taken[image]:
            gathering.add_caption(image, caption)
    return gathering.finish(strict=strict)


def _columns(csv_path: Path, reader: csv.DictReader[str]) -> list[str]:
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise DataError(f"{csv_path} has no readable first line ({error}): save it as CSV") from error
    if not {"image", "caption"} <= set(columns) or len(set(columns)) != len(columns):
        raise DataError(
            f"{csv_path} begins with {', '.join(columns)[:200] or 'nothing'}: "
            "its first line must name the columns image and caption, and may name split, each once"
        )
    reader.fieldnames = columns
    return columns


def _rows(reader: csv.DictReader[str], gathering: Gathering) -> Iterator[dict[str, str]]:
    """Rows with exactly the named columns; others are counted."""
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            # A stray quote, or a field of more characters than the module takes; the next line is read all the same.
            row = {}
        if row and None not in row and None not in row.values():
            yield row
        else:
            gathering.problems.record("bad_row", f"line {reader.reader.line_num}")

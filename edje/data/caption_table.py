"""Reads a CSV table of images and captions.

    image,caption,split
    beach/1.jpg,a dog runs on a beach,train

Three columns are optional. Without `split`, images are divided by a hash of their names. `teacher_score` is a teacher's
score of the pair. A `label` of 0 makes the pair a negative. Other columns are ignored.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Final

from edje.data.csv_rows import BadRow, CsvTable, Row
from edje.data.dataset import SPLIT_NAMES, DataError, Dataset, Split, split_named
from edje.data.image_files import DatasetBuilder, read_text_list

_REQUIRED: Final = ("image", "caption")
_OPTIONAL: Final = ("split", "teacher_score", "label")
_HASH_RANGE: Final = 1 << 64


def caption_table(
    csv_path: Path,
    image_root: Path,
    split: Split | None = None,
    *,
    dev_share: float = 0.1,
    test_share: float = 0.1,
    leave_out: Path | None = None,
    strict: bool = False,
) -> Dataset:
    """The rows of one split, or all rows where `split` is None. An image has as many captions as rows.

    Where the table has no column `split`, `dev_share` and `test_share` of the images are the splits dev and test.
    Images in the file `leave_out` (see `read_leave_out`) are left out.
    Raises `DataError`. A faulty row is counted and left out, or raises `DataError` if `strict`.
    """
    table = CsvTable(csv_path, read_text_list(csv_path), _REQUIRED, _OPTIONAL)
    builder = DatasetBuilder(csv_path.stem if split is None else f"{csv_path.stem} {split}", image_root, leave_out)
    has_splits = "split" in table.columns
    split_of: dict[str, Split] = {}
    is_taken: dict[str, bool] = {}
    num_rows: Counter[str] = Counter()
    for row in table.rows(lambda cells: builder.has_file(cells.get("image", "").strip(' "'))):
        location = f"{csv_path.name} line {row.line}"
        if isinstance(row, BadRow):
            builder.problems.record("bad_row", row.cause, location)
            continue
        image = row.cells["image"].strip()
        if not image:
            builder.problems.record("bad_row", "the column image is empty", location)
            continue
        row_split = _split_of(row) if has_splits else hashed_split(image, dev_share, test_share)
        if row_split is None:
            builder.problems.record("unknown_split", _unknown_split(row), location)
            continue
        num_rows[row_split] += 1
        first_split = split_of.setdefault(image, row_split)
        if split is not None and row_split != split:
            continue
        if split is not None and row_split != first_split:
            # An image must not be used both for training and for testing.
            builder.problems.record("two_splits", image, location)
            continue
        if image not in is_taken:
            is_taken[image] = builder.add_image(image, image, location)
        if not is_taken[image]:
            continue
        try:
            score, label = _number(row, "teacher_score"), _number(row, "label")
        except ValueError as error:
            builder.problems.record("bad_score", str(error), location)
            continue
        if score is None and label is None:
            builder.add_caption(image, row.cells["caption"], location)
        else:
            builder.add_judged(image, row.cells["caption"], is_positive=label is None or label > 0, score=score)
    if split is not None and num_rows and not num_rows[split]:
        raise DataError(_no_rows(csv_path, split, num_rows, has_splits))
    return builder.finish(strict=strict)


def hashed_split(image: str, dev_share: float, test_share: float) -> Split:
    """Return a split by the hash of an image's name. It does not change when other images are added or removed."""
    digest = hashlib.sha256(image.encode(errors="surrogatepass")).digest()
    position = int.from_bytes(digest[:8], "big") / _HASH_RANGE
    if position < test_share:
        return "test"
    return "dev" if position < test_share + dev_share else "train"


def _split_of(row: Row) -> Split | None:
    return split_named(row.cells["split"])


def _number(row: Row, column: str) -> float | None:
    """The number in an optional column. Raises `ValueError` for any other text."""
    text = row.cells.get(column, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{column} {text!r} is not a number")
    return value


def _unknown_split(row: Row) -> str:
    return f"{row.cells['split']!r} is not one of {', '.join(SPLIT_NAMES)}"


def _no_rows(csv_path: Path, split: Split, num_rows: Counter[str], has_splits: bool) -> str:
    found = ", ".join(f"{count:,} for {name}" for name, count in sorted(num_rows.items()))
    remedy = (
        f"name the split {split} in the column split of some rows"
        if has_splits
        else "add a column split, or raise dev_share and test_share"
    )
    return f"{csv_path} has no row for the split {split}, but {found}: {remedy}"

"""Reads Flickr30k and COCO in the layout of Karpathy's JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from edje.data.dataset import SPLIT_NAMES, DataError, Dataset, Split, split_named
from edje.data.image_files import DatasetBuilder, read_list

#: COCO's validation images that are in neither `val` nor `test`; they are commonly used for training.
_RESTVAL: Final = "restval"


class _Sentence(BaseModel):
    model_config = ConfigDict(strict=True)

    raw: str


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    filename: str
    filepath: str = ""
    split: str
    sentences: list[_Sentence]
    imgid: int | None = None

    @property
    def image_id(self) -> str:
        """The file name within the image folder. Only COCO has a subfolder for each split."""
        return f"{self.filepath}/{self.filename}" if self.filepath else self.filename


def karpathy(
    json_path: Path,
    image_root: Path,
    split: Split,
    *,
    restval: bool = True,
    leave_out: Path | None = None,
    strict: bool = False,
) -> Dataset:
    """One split of a `dataset_*.json`. With `restval`, the split `restval` counts as `train`.

    Images in the file `leave_out` (see `read_leave_out`) are left out.

    Raises `DataError`. A faulty entry is counted and left out, or raises `DataError` if `strict`.
    """
    builder = DatasetBuilder(f"{json_path.stem} {split}", image_root, leave_out)
    seen_ids: set[str] = set()
    seen_numbers: set[int] = set()
    for number, raw in enumerate(_entries(json_path)):
        location = f"{json_path.name} entry {number}"
        try:
            entry = _Entry.model_validate(raw)
        except ValidationError as error:
            builder.problems.record("bad_row", _name_of(raw) or _cause(error), location)
            continue
        # Duplicates count over all splits, so that no image is used both for training and for testing.
        duplicate = entry.image_id in seen_ids or (entry.imgid is not None and entry.imgid in seen_numbers)
        seen_ids.add(entry.image_id)
        if entry.imgid is not None:
            seen_numbers.add(entry.imgid)
        is_restval = entry.split.casefold() == _RESTVAL
        entry_split: Split | None = "train" if is_restval else split_named(entry.split)
        if entry_split is None:
            cause = f"{entry.split!r} is not one of {', '.join([*SPLIT_NAMES, _RESTVAL])}"
            builder.problems.record("unknown_split", cause, location)
        elif entry_split != split or (is_restval and not restval):
            continue
        elif duplicate:
            builder.problems.record("duplicate_id", entry.image_id, location)
        elif builder.add_image(entry.image_id, entry.image_id, location):
            for sentence in entry.sentences:
                builder.add_caption(entry.image_id, sentence.raw, location)
    return builder.finish(strict=strict)


def _entries(json_path: Path) -> list[object]:
    try:
        document = from_json(read_list(json_path))
    except ValueError as error:
        raise DataError(f"{json_path} is not a complete JSON file ({error}): copy it again") from error
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list):
        raise DataError(
            f"{json_path} has no list of images: name a file in Karpathy's layout, such as dataset_flickr30k.json, "
            'which begins {"images": [{"filename": …'
        )
    return images


def _name_of(raw: object) -> str | None:
    name = raw.get("filename") if isinstance(raw, dict) else None
    return name if isinstance(name, str) else None


def _cause(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'entry'}: {first['msg']}"

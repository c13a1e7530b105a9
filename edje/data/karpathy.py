"""Reads Flickr30k and COCO as Karpathy's JSON lists them. Knows that layout alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from edje.data.dataset import DataError, Dataset, Split
from edje.data.image_files import Gathering, read_list

_SPLIT_NAMES: Final[dict[Split, str]] = {"train": "train", "dev": "val", "test": "test"}
#: COCO's validation images that are in neither `val` nor `test`; everybody trains on them.
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
        """The file below the image folder. COCO's lie in folders of their own, others' in none."""
        return f"{self.filepath}/{self.filename}" if self.filepath else self.filename


def karpathy(json_path: Path, image_root: Path, split: Split, *, restval: bool = True, strict: bool = False) -> Dataset:
    """One split of a `dataset_*.json`. With `restval`, COCO's leftover images count as `train`.

    Raises `DataError`; a faulty entry is counted and left out unless `strict`.
    """
    wanted = {_SPLIT_NAMES[split]} | ({_RESTVAL} if restval and split == "train" else set())
    gathering = Gathering(f"{json_path.stem} {split}", image_root)
    seen_ids: set[str] = set()
    seen_numbers: set[int] = set()
    for number, raw in enumerate(_entries(json_path)):
        try:
            entry = _Entry.model_validate(raw)
        except ValidationError:
            gathering.problems.record("bad_row", _name_of(raw) or f"entry {number}")
            continue
        # Over all splits, so that no image can be both trained on and judged by.
        duplicate = entry.image_id in seen_ids or (entry.imgid is not None and entry.imgid in seen_numbers)
        seen_ids.add(entry.image_id)
        if entry.imgid is not None:
            seen_numbers.add(entry.imgid)
        if entry.split not in wanted:
            continue
        if duplicate:
            gathering.problems.record("duplicate_id", entry.image_id)
        elif gathering.add_image(entry.image_id, entry.image_id):
            for sentence in entry.sentences:
                gathering.add_caption(entry.image_id, sentence.raw)
    return gathering.finish(strict=strict)


def _entries(json_path: Path) -> list[object]:
    try:
        document = from_json(read_list(json_path))
    except ValueError as error:
        raise DataError(f"{json_path} is no whole JSON file ({error}): copy it again") from error
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list):
        raise DataError(
            f"{json_path} has no list of images: name a file in Karpathy's layout, "
            'such as dataset_flickr30k.json, which begins {"images": [{"filename": …'
        )
    return images


def _name_of(raw: object) -> str | None:
    name = raw.get("filename") if isinstance(raw, dict) else None
    return name if isinstance(name, str) else None

"""Datasets: images with captions, labels where a dataset has them, and the problems a reader found.

Knows no file format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edje.images import ImageError, Resample

Split = Literal["train", "dev", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "dev", "test")
#: Names of the splits in files; upper and lower case are the same.
SPLIT_NAMES: Final[dict[str, Split]] = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
    "testing": "test",
}

#: Singular and plural of every kind of problem, as a report words it.
PROBLEM_KINDS: Final = {
    "bad_row": ("row that cannot be read", "rows that cannot be read"),
    "duplicate_id": ("repeated image or caption id", "repeated image or caption ids"),
    "empty_caption": ("empty caption", "empty captions"),
    "left_out": ("image on the list of images to leave out", "images on the list of images to leave out"),
    "long_caption": ("caption so long that most of it is cut off", "captions so long that most of it is cut off"),
    "missing_image": ("image whose file is missing", "images whose file is missing"),
    "no_positive": ("list without a positive candidate", "lists without a positive candidate"),
    "no_caption": ("image without a caption", "images without a caption"),
    "outside_root": ("file name outside the image folder", "file names outside the image folder"),
    "bad_score": ("teacher score or label that is not a number", "teacher scores or labels that are not numbers"),
    "remote_image": ("web address instead of an image file", "web addresses instead of image files"),
    "two_splits": ("image in a second split", "images in a second split"),
    "undecodable_image": ("image that cannot be decoded", "images that cannot be decoded"),
    "unknown_split": ("row with an unknown split", "rows with an unknown split"),
}
#: Problems whose item is kept.
_KEPT: Final = ("long_caption",)
#: Every problem is counted; this many of each kind are named.
_MAX_NAMED: Final = 5
_MAX_NAME_CHARS: Final = 120


class DataError(Exception):
    """The data cannot be used; the message says what is wrong, where, and what to do."""


def split_named(name: str) -> Split | None:
    """The split that a file calls by this name, or None if the name is unknown."""
    return SPLIT_NAMES.get(name.strip().casefold())


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image's id and captions. Images with the same `group` are confusers of each other."""

    image_id: str
    captions: tuple[str, ...]
    group: str | None = None


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A text and an image that were judged, positive or not, and a teacher's score of the pair."""

    text: str
    image_id: str
    score: float | None = None


class Problems:
    """Counts problems of the input by kind and keeps the first names of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._named: dict[str, list[tuple[str, str]]] = {}  # kind: (location, name)

    def record(self, kind: str, name: str, location: str = "") -> None:
        """Count one problem. `kind` is a key of `PROBLEM_KINDS`; `location` is a file and line, where known."""
        if kind not in PROBLEM_KINDS:
            raise ValueError(f"unknown kind of problem: {kind}")
        self._counts[kind] += 1
        named = self._named.setdefault(kind, [])
        if len(named) < _MAX_NAMED:
            named.append((location, _printable(name)))

    def add(self, other: Problems, prefix: str) -> None:
        """Add another dataset's problems, with a prefix before each location, or before a name without a location."""
        for kind, count in other._counts.items():
            named = other._named[kind]
            for location, name in named:
                if location:
                    self.record(kind, name, f"{prefix}{location}")
                else:
                    self.record(kind, f"{prefix}{name}")
            self._counts[kind] += count - len(named)

    @property
    def counts(self) -> dict[str, int]:
        """The number of problems of each kind that occurred."""
        return dict(self._counts)

    def named(self, kind: str) -> tuple[str, ...]:
        """The first few names of this kind."""
        return tuple(name for _, name in self._named.get(kind, ()))

    def __bool__(self) -> bool:
        return bool(self._counts)

    def report(self) -> str:
        """One paragraph: what was left out, and what was kept despite a problem."""
        if not self:
            return "No problems."
        left_out = [self._description(kind) for kind in sorted(self._counts) if kind not in _KEPT]
        kept = [self._description(kind) for kind in sorted(self._counts) if kind in _KEPT]
        sentences = [f"Left out: {'; '.join(left_out)}."] if left_out else []
        return " ".join([*sentences, *([f"Kept: {'; '.join(kept)}."] if kept else [])])

    def _description(self, kind: str) -> str:
        count, named = self._counts[kind], self._named[kind]
        names = [f"{location}: {name}" if location else name for location, name in named]
        more = ["…"] if count > len(named) else []
        return f"{count:,} {PROBLEM_KINDS[kind][count > 1]} ({', '.join([*names, *more])})"


def _printable(name: str) -> str:
    """The name in one line of a terminal: shortened, control characters escaped."""
    short = name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}…"
    return short if short.isprintable() else ascii(short)


class PixelSource(Protocol):
    """Reads or draws the pixels of a dataset's images."""

    def pixels(self, index: int, size: int, resample: Resample) -> NDArray[np.uint8]:
        """RGB pixels `(3, size, size)` of one image, by its index. Raises `ImageError`."""
        ...


@runtime_checkable
class KeyedSource(Protocol):
    """A pixel source that identifies each image, so that results computed from it can be stored."""

    def image_key(self, index: int) -> str:
        """A text that changes whenever the pixels of an image may have changed; reads no pixels."""
        ...

    def content_key(self, index: int) -> str:
        """A text that changes with the content of an image alone. Raises `OSError`."""
        ...


class GroundingRole(IntEnum):
    """What a grounding label gives: the cell of the named object, of a relation's subject or object, or whether the
    relation holds."""

    NAMED = 0
    SUBJECT = 1
    OBJECT = 2
    HOLDS = 3


class GroundingLabel(NamedTuple):
    """One grounding label at a character offset of a caption. `value` is a cell, or 0 or 1 for `HOLDS`."""

    char: int
    role: GroundingRole
    value: int


@runtime_checkable
class LabelledSource(Protocol):
    """A pixel source that also has region labels and grounding labels."""

    @property
    def label_sizes(self) -> tuple[int, ...]:
        """The number of values of each region label."""
        ...

    @property
    def num_regions(self) -> int:
        """The number of cells of the square grid that divides an image."""
        ...

    def labels(self, index: int) -> NDArray[np.int64]:
        """Region labels `(num_regions, labels)` of one image, regions row by row."""
        ...

    def grounding_labels(self, index: int, caption: str) -> list[GroundingLabel]:
        """Grounding labels of a caption for one image, which may belong to another caption.

        The caption is lower case without punctuation. Objects that the image lacks have no label.
        """
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images with captions, in a fixed order.

    `fingerprint` identifies the image ids and pixels in their order, not the captions; results computed from pixels
    alone can be stored under it.
    """

    name: str
    images: tuple[CaptionedImage, ...]
    problems: Problems
    fingerprint: str
    source: PixelSource
    judged: tuple[JudgedPair, ...] = ()

    def pixels(self, index: int, size: int, resample: Resample = "bilinear") -> NDArray[np.uint8]:
        """RGB pixels `(3, size, size)` of one image. Raises `ImageError`."""
        return self.source.pixels(index, size, resample)

    def image_key(self, index: int) -> str:
        """See `KeyedSource`. Images of other sources change with the whole dataset."""
        if isinstance(self.source, KeyedSource):
            return self.source.image_key(index)
        return f"{self.fingerprint} {index}"

    def content_key(self, index: int) -> str:
        """See `KeyedSource`. Raises `OSError`."""
        return self.source.content_key(index) if isinstance(self.source, KeyedSource) else self.image_key(index)

    @property
    def num_captions(self) -> int:
        """The number of captions of all images."""
        return sum(len(image.captions) for image in self.images)

    def summary(self) -> str:
        """One paragraph for the log: name, sizes, problems."""
        return f"{self.name}: {len(self.images):,} images, {self.num_captions:,} captions. {self.problems.report()}"


def decode_images(
    dataset: Dataset,
    size: int,
    on_problem: Callable[[str, str], None],
    *,
    strict: bool = False,
    resample: Resample = "bilinear",
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield index and pixels of every image that can be decoded.

    For any other image `on_problem` (such as `dataset.problems.record`) is called with the kind and the image id.
    Raises `DataError` at the first such image if `strict`.
    """
    for index, image in enumerate(dataset.images):
        try:
            pixels = dataset.pixels(index, size, resample)
        except ImageError as error:
            on_problem("undecodable_image", image.image_id)
            if strict:
                raise undecodable(dataset, index, str(error)) from error
            continue
        yield index, pixels


def undecodable(dataset: Dataset, index: int, cause: str) -> DataError:
    """The error for an image that cannot be decoded where every image is needed."""
    return DataError(
        f"{dataset.name}: image {dataset.images[index].image_id} ({index + 1:,} of {len(dataset.images):,}) cannot be "
        f"decoded ({cause}): replace the file, or remove the image from the list"
    )

"""What a dataset is, and how its faults are told. Knows no file format."""

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

#: Every kind of fault, and how a report words it.
KINDS: Final = {
    "bad_row": "entries that cannot be read",
    "duplicate_id": "images or captions that came before under the same id, or under another name",
    "empty_caption": "empty captions",
    "long_caption": "captions so long that most of it is cut off",
    "missing_image": "images whose file is missing",
    "no_caption": "images without a caption",
    "outside_root": "file names that lead out of the image folder",
    "undecodable_image": "images that do not decode",
}
#: Faults that leave their item usable.
_HARMLESS: Final = ("long_caption",)
#: All are counted, so many of each kind are named.
_MAX_NAMED: Final = 5
_MAX_NAME_CHARS: Final = 80


class DataError(Exception):
    """The data cannot be used as asked; the message is a sentence for whoever gave it."""


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image's id and captions. Images of one `group` were drawn to be confused with each other."""

    image_id: str
    captions: tuple[str, ...]
    group: str | None = None


class Problems:
    """Counts what was wrong with the input, by kind, and remembers the first names of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._named: dict[str, list[str]] = {}

    def record(self, kind: str, name: str) -> None:
        """Count one fault; `kind` is a key of `KINDS`."""
        if kind not in KINDS:
            raise ValueError(f"no such kind of problem: {kind}")
        self._counts[kind] += 1
        named = self._named.setdefault(kind, [])
        if len(named) < _MAX_NAMED:
            # A file may call its images anything: what is shown stays on one line of a terminal.
            short = name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}…"
            named.append(short if short.isprintable() else ascii(short))

    def add(self, other: Problems, prefix: str) -> None:
        """Take over another's, names with a prefix."""
        for kind, count in other._counts.items():
            named = other._named[kind]
            for name in named:
                self.record(kind, f"{prefix}{name}")
            self._counts[kind] += count - len(named)

    @property
    def counts(self) -> dict[str, int]:
        return dict(self._counts)

    def named(self, kind: str) -> tuple[str, ...]:
        """The first few of this kind."""
        return tuple(self._named.get(kind, ()))

    def __bool__(self) -> bool:
        return bool(self._counts)

    def report(self) -> str:
        """One paragraph: what was left out and what was kept in spite of a fault."""
        if not self:
            return "Nothing was wrong with the data."
        left_out = [self._told(kind) for kind in sorted(self._counts) if kind not in _HARMLESS]
        kept = [self._told(kind) for kind in sorted(self._counts) if kind in _HARMLESS]
        sentences = [f"Left out: {'; '.join(left_out)}."] if left_out else []
        return " ".join([*sentences, *([f"Kept: {'; '.join(kept)}."] if kept else [])])

    def _told(self, kind: str) -> str:
        count, named = self._counts[kind], self._named[kind]
        more = ", …" if count > len(named) else ""
        return f"{count:,} {KINDS[kind]} ({', '.join(named)}{more})"


class PixelSource(Protocol):
    """Where a dataset's pixels come from."""

    def pixels(self, index: int, size: int, resample: Resample) -> NDArray[np.uint8]:
        """`(3, size, size)` RGB of the image of this number. Raises `ImageError`."""
        ...


class Role(IntEnum):
    """What is known of a word beside a picture: where that stands which it names, or of which it says how it lies to
    another, where the other stands, and whether it is true."""

    NAMED = 0
    SUBJECT = 1
    OBJECT = 2
    TRUE = 3


class Claim(NamedTuple):
    """What a word of a caption, given by its first character, says beside a picture: a region, or 0 or 1 for its
    truth."""

    char: int
    role: Role
    value: int


@runtime_checkable
class LabelledSource(Protocol):
    """Where it is known, besides, what stands in each region of a picture."""

    @property
    def label_sizes(self) -> tuple[int, ...]:
        """How many values each label has."""
        ...

    @property
    def num_regions(self) -> int:
        """The cells of the square grid that a picture is divided into."""
        ...

    def labels(self, index: int) -> NDArray[np.int64]:
        """`(num_regions, labels)`, row by row: a value of each label for each region."""
        ...

    def claims(self, index: int, caption: str) -> list[Claim]:
        """What the words of a caption (lower case, no punctuation) say beside the picture, which need not be its own;
        nothing of what is not in the picture."""
        ...


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images with captions, in a fixed order.

    `fingerprint` identifies ids and pixels, in their order, but not the captions: whatever is computed from the
    pixels alone may be kept under it.
    """

    name: str
    images: tuple[CaptionedImage, ...]
    problems: Problems
    fingerprint: str
    source: PixelSource

    def pixels(self, index: int, size: int, resample: Resample = "bilinear") -> NDArray[np.uint8]:
        """`(3, size, size)` RGB. Raises `ImageError`."""
        return self.source.pixels(index, size, resample)

    @property
    def num_captions(self) -> int:
        return sum(len(image.captions) for image in self.images)

    def summary(self) -> str:
        """One paragraph for the log."""
        return f"{self.name}: {len(self.images):,} images, {self.num_captions:,} captions. {self.problems.report()}"


def readable(
    dataset: Dataset,
    size: int,
    on_problem: Callable[[str, str], None],
    *,
    strict: bool = False,
    resample: Resample = "bilinear",
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Number and pixels of every image that decodes.

    One that does not is told to `on_problem` (`dataset.problems.record` will do) and left out, or, if `strict`, ends
    the reading with `DataError`.
    """
    for index, image in enumerate(dataset.images):
        try:
            pixels = dataset.pixels(index, size, resample)
        except ImageError as error:
            on_problem("undecodable_image", image.image_id)
            if strict:
                raise DataError(
                    f"{dataset.name}: {image.image_id} is image {index + 1:,} of {len(dataset.images):,} and does not "
                    f"decode ({error}): replace the file, or take the image out of the list"
                ) from error
            continue
        yield index, pixels

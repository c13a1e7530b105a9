"""Builds a dataset from image files and captions that a reader finds, and reads the files' pixels.

Applies one policy for every reader: a faulty item is counted, named and left out, and no file outside the image folder
is opened. Knows no list format.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edje.data.dataset import CaptionedImage, DataError, Dataset, JudgedPair, Problems
from edje.images import ImageError, ImageLimits, Resample, decode_image

_LIMITS: Final = ImageLimits(max_bytes=64 << 20, max_pixels=100_000_000)
#: The captions of COCO, the largest list in use, have 150 MB.
_MAX_LIST_BYTES: Final = 1 << 30
#: The longest caption in Flickr30k has 82 words; the tokenizer reads 61 word pieces.
_MAX_CAPTION_WORDS: Final = 200
_FINGERPRINT_CHARS: Final = 16
_UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}(\s|$)")


class FileUnreadable(ImageError):
    """The image file cannot be opened or read at this time."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A regular file within the image folder, with its size and modification time when the list was read."""

    path: Path
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Reads pixels from files."""

    files: tuple[ImageFile, ...]

    def pixels(self, index: int, size: int, resample: Resample) -> NDArray[np.uint8]:
        """RGB pixels `(3, size, size)`. Raises `ImageError`, also where the file is missing by now."""
        try:
            with self.files[index].path.open("rb") as file:
                data = file.read(_LIMITS.max_bytes + 1)
        except OSError as error:
            raise FileUnreadable("image_broken", f"the file cannot be read: {error.strerror}") from error
        return decode_image(data, size, _LIMITS, resample)

    def image_key(self, index: int) -> str:
        """Path, size and modification time."""
        file = self.files[index]
        return f"{file.path}\0{file.num_bytes}\0{file.modified_ns}"

    def content_key(self, index: int) -> str:
        """SHA-256 of the file. Raises `OSError`."""
        return file_digest(self.files[index].path)


class DatasetBuilder:
    """Collects images and captions; `finish` returns them as a dataset."""

    def __init__(self, name: str, image_root: Path, leave_out: Path | None = None) -> None:
        """`leave_out` is a file for `read_leave_out`. Raises `DataError` if it or the image folder is missing."""
        self.name = name
        self._left_out = None if leave_out is None else read_leave_out(leave_out)
        self.problems = Problems()
        if not image_root.is_dir():
            raise DataError(f"{image_root} is not a folder: name the folder with the images of {name}")
        self._root = image_root.resolve()
        self._files: dict[str, ImageFile] = {}
        self._captions: dict[str, list[str]] = {}
        self._judged: list[JudgedPair] = []
        self._paths: set[Path] = set()

    def has_file(self, file_name: str) -> bool:
        """Whether the image folder contains this file."""
        return bool(file_name) and self._find(file_name)[0] is not None

    def add_image(self, image_id: str, file_name: str, location: str = "") -> bool:
        """Add an image unless it has a problem, which is counted. Returns whether it was added."""
        file, problem = self._find(file_name)
        if file is not None and (image_id in self._files or file.path in self._paths):
            problem = "duplicate_id"
        elif file is not None and self._left_out is not None and self._left_out.contains(image_id, file.path):
            problem = "left_out"
        if file is None or problem is not None:
            self.problems.record(problem or "missing_image", image_id, location)
            return False
        self._paths.add(file.path)
        self._files[image_id] = file
        self._captions[image_id] = []
        return True

    def add_caption(self, image_id: str, caption: str, location: str = "") -> None:
        """Add a caption to an image that was added, unless it has neither letters nor digits."""
        if not any(map(str.isalnum, caption)):
            self.problems.record("empty_caption", image_id, location)
            return
        if len(caption.split()) > _MAX_CAPTION_WORDS:
            self.problems.record("long_caption", image_id, location)
        self._captions[image_id].append(caption.strip())

    def add_judged(self, image_id: str, text: str, *, is_positive: bool, score: float | None) -> None:
        """Add a judged pair of an image that was added; the text of a positive pair becomes a caption."""
        if is_positive and text.strip() not in self._captions[image_id]:
            self.add_caption(image_id, text)
        self._judged.append(JudgedPair(text, image_id, score))

    def finish(self, *, strict: bool) -> Dataset:
        """The dataset. Raises `DataError` if no image is left or, if `strict`, if there is any problem."""
        images = []
        judged_ids = {pair.image_id for pair in self._judged}
        for image_id, captions in self._captions.items():
            if captions or image_id in judged_ids:
                images.append(CaptionedImage(image_id, tuple(captions)))
            else:
                self.problems.record("no_caption", image_id)
        if strict and self.problems.counts.keys() - {"left_out"}:
            raise DataError(
                f"{self.name} has problems, so figures from it would not be comparable. {self.problems.report()} "
                "Correct the list or the files."
            )
        if not images:
            if not self.problems:
                raise DataError(f"{self.name} has no images: the list has no entry for it")
            raise DataError(
                f"{self.name} has no usable image. {self.problems.report()} File names are relative to {self._root}."
            )
        files = [self._files[image.image_id] for image in images]
        digest = hashlib.sha256()
        for image, file in zip(images, files, strict=True):
            digest.update(f"{image.image_id}\0{file.num_bytes}\0{file.modified_ns}\n".encode(errors="surrogatepass"))
        source = ImageFiles(tuple(files))
        return Dataset(
            self.name,
            tuple(images),
            self.problems,
            digest.hexdigest()[:_FINGERPRINT_CHARS],
            source,
            tuple(self._judged),
        )

    def _find(self, file_name: str) -> tuple[ImageFile | None, str | None]:
        """The file of this name, or the kind of problem with it."""
        if "://" in file_name:
            return None, "remote_image"
        found = self._find_exactly(file_name)
        if found[1] == "missing_image" and "\\" in file_name:
            found = self._find_exactly(file_name.replace("\\", "/"))  # a list that was written on Windows
        return found

    def _find_exactly(self, file_name: str) -> tuple[ImageFile | None, str | None]:
        try:
            path = (self._root / file_name).resolve()
            if not path.is_relative_to(self._root):
                return None, "outside_root"
            status = path.stat()
        except (OSError, ValueError, RuntimeError):
            # ValueError: a null byte or a lone surrogate. RuntimeError: circular links, until Python 3.12.
            return None, "missing_image"
        if not S_ISREG(status.st_mode):
            return None, "missing_image"
        return ImageFile(path, status.st_size, status.st_mtime_ns), None


@dataclass(frozen=True, slots=True)
class LeaveOutList:
    """Images that are left out, by id or by the SHA-256 of their files."""

    ids: frozenset[str]
    digests: frozenset[str]

    def contains(self, image_id: str, path: Path) -> bool:
        """Whether an image is on the list. Reads its file only if the list has digests."""
        if image_id in self.ids:
            return True
        try:
            return bool(self.digests) and file_digest(path) in self.digests
        except OSError:
            return False  # the file is reported when its pixels are read


def read_leave_out(path: Path) -> LeaveOutList:
    """The list of a text file: on each line an image id, or a SHA-256 as the command `sha256sum` prints it.

    Raises `DataError`.
    """
    lines = [line.strip() for line in read_text_list(path).splitlines()]
    digests = {line.split()[0].lower() for line in lines if _SHA256.match(line)}
    return LeaveOutList(frozenset(line for line in lines if line and not _SHA256.match(line)), frozenset(digests))


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_list(path: Path) -> bytes:
    """The bytes of a file that lists images or captions. Raises `DataError`."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > _MAX_LIST_BYTES:
            raise DataError(
                f"{path} has {num_bytes:,} bytes; a list of captions has at most {_MAX_LIST_BYTES:,}: name the file "
                "of captions"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): name an existing file of captions") from error


def read_text_list(path: Path) -> str:
    """The text of such a file, in UTF-8 or UTF-16, without its byte order mark. Raises `DataError`."""
    data = read_list(path)
    encoding = "utf-16" if data.startswith(_UTF16_MARKS) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8, which "
            "spreadsheets call CSV UTF-8"
        ) from error

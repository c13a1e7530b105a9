"""Gathers images and their captions from files, whatever lists them, and reads their pixels.

Holds the policy of every reader: a faulty item is counted, named and left out, and nothing outside the image folder
is ever opened. Knows no file format but the images'.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edje.data.dataset import CaptionedImage, DataError, Dataset, Problems
from edje.images import ImageError, ImageLimits, Resample, decode_image

_LIMITS: Final = ImageLimits(max_bytes=64 << 20, max_pixels=100_000_000)
#: The captions of COCO, the largest list in use, have 150 MB.
_MAX_LIST_BYTES: Final = 1 << 30
#: The longest caption in Flickr30k has 82 words; the tokenizer reads 61 word pieces.
_MAX_CAPTION_WORDS: Final = 200
_FINGERPRINT_CHARS: Final = 16


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A regular file within the image folder, as it was when the list was read."""

    path: Path
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Pixels from files."""

    paths: tuple[Path, ...]

    def pixels(self, index: int, size: int, resample: Resample) -> NDArray[np.uint8]:
        """`(3, size, size)` RGB. Raises `ImageError`, also where the file is gone since the list was read."""
        try:
            with self.paths[index].open("rb") as file:
                data = file.read(_LIMITS.max_bytes + 1)
        except OSError as error:
            raise ImageError("image_broken", f"the file cannot be read: {error.strerror}") from error
        return decode_image(data, size, _LIMITS, resample)


class Gathering:
    """Images and captions as a reader comes upon them; `finish` makes them a dataset."""

    def __init__(self, name: str, image_root: Path) -> None:
        self.name = name
        self.problems = Problems()
        if not image_root.is_dir():
            raise DataError(f"{image_root} is no folder: name the folder that holds the images of {name}")
        self._root = image_root.resolve()
        self._files: dict[str, ImageFile] = {}
        self._captions: dict[str, list[str]] = {}
        self._paths: set[Path] = set()

    def add_image(self, image_id: str, file_name: str) -> bool:
        """Whether the image is taken; if not, the reason is counted. An id is taken once."""
        file = self._find(image_id, file_name)
        if file is None:
            return False
        if image_id in self._files or file.path in self._paths:
            self.problems.record("duplicate_id", image_id)
            return False
        self._paths.add(file.path)
        self._files[image_id] = file
        self._captions[image_id] = []
        return True

    def add_caption(self, image_id: str, caption: str) -> None:
        """Keep a caption of an image that was taken, if it says anything."""
        if not any(map(str.isalnum, caption)):
            self.problems.record("empty_caption", image_id)
            return
        if len(caption.split()) > _MAX_CAPTION_WORDS:
            self.problems.record("long_caption", image_id)
        self._captions[image_id].append(caption.strip())

    def finish(self, *, strict: bool) -> Dataset:
        """The dataset. Raises `DataError` if nothing is left or, if `strict`, if there was any problem."""
        images = []
        for image_id, captions in self._captions.items():
            if captions:
                images.append(CaptionedImage(image_id, tuple(captions)))
            else:
                self.problems.record("no_caption", image_id)
        if strict and self.problems:
            raise DataError(
                f"{self.name} has faults, and figures from it would not be comparable. "
                f"{self.problems.report()} Mend the list or the files."
            )
        if not images:
            raise DataError(f"{self.name} has no usable image. {self.problems.report()}")
        files = [self._files[image.image_id] for image in images]
        digest = hashlib.sha256()
        for image, file in zip(images, files, strict=True):
            digest.update(f"{image.image_id}\0{file.num_bytes}\0{file.modified_ns}\n".encode(errors="surrogatepass"))
        source = ImageFiles(tuple(file.path for file in files))
        return Dataset(self.name, tuple(images), self.problems, digest.hexdigest()[:_FINGERPRINT_CHARS], source)

    def _find(self, image_id: str, file_name: str) -> ImageFile | None:
        try:
            path = (self._root / file_name).resolve()
            inside = path.is_relative_to(self._root)
            status = path.stat() if inside else None
        except (OSError, ValueError, RuntimeError):
            # ValueError from a null byte or a lone surrogate, RuntimeError (until Python 3.12) from links in a circle.
            inside, status = True, None
        if not inside:
            self.problems.record("outside_root", image_id)
        elif status is None or not S_ISREG(status.st_mode):
            self.problems.record("missing_image", image_id)
        else:
            return ImageFile(path, status.st_size, status.st_mtime_ns)
        return None


def read_list(path: Path) -> bytes:
    """The bytes of a file that lists images or captions. Raises `DataError`."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > _MAX_LIST_BYTES:
            raise DataError(
                f"{path} has {num_bytes:,} bytes, and no list of captions is that large "
                f"({_MAX_LIST_BYTES:,} at most): name the file of captions"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): name an existing file of captions") from error


def read_text_list(path: Path) -> str:
    """The same as text, without a byte order mark."""
    try:
        return read_list(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 from byte {error.start:,} on: save it as UTF-8") from error

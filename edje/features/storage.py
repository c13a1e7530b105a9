"""Features of a dataset's images as files: a draft that can be gone on with, and the finished folder.

    tokens.npy   patch tokens, a row for each image of the dataset
    pooled.npy   pooled embeddings, likewise
    index.json   image ids, and which images could not be read: their rows are zeros

A draft holds `progress.json` in place of the index. It becomes the finished folder by being renamed, so that what has
the finished name is whole. Knows neither towers nor datasets.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from edje.files import replace_directory, write_file

_TOKENS, _POOLED, _INDEX, _PROGRESS = "tokens.npy", "pooled.npy", "index.json", "progress.json"


class FeaturesError(Exception):
    """Features cannot be extracted or read; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Features:
    """Row i belongs to image i of the dataset; only `rows` hold something."""

    key: str
    ids: tuple[str, ...]
    tokens: NDArray[np.floating]  # (N, S, D), mapped from the disk
    pooled: NDArray[np.floating]  # (N, E), likewise
    unreadable: dict[int, str]  # number of the image: cause

    @property
    def rows(self) -> NDArray[np.int64]:
        """Numbers of the images that have features, in order."""
        is_readable = np.ones(len(self.ids), bool)
        is_readable[list(self.unreadable)] = False
        return np.flatnonzero(is_readable)


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    ids: tuple[str, ...]
    unreadable: dict[int, str]


class _Progress(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    num_done: int
    unreadable: dict[int, str]


class Draft:
    """Rows being written. `num_done` images, from the first on, are safe on the disk."""

    def __init__(self, folder: Path, num_images: int, dtype: str) -> None:
        self._folder = folder
        self._num_images = num_images
        self._dtype = np.dtype(dtype)
        self._arrays: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None
        self.num_done = 0
        self.unreadable: dict[int, str] = {}
        if not self._resume():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def write(self, rows: Sequence[int], tokens: NDArray[np.floating], pooled: NDArray[np.floating]) -> None:
        """Put features, (n, S, D) and (n, E), into these rows."""
        if self._arrays is None:
            self._arrays = (self._new(_TOKENS, tokens), self._new(_POOLED, pooled))
        self._arrays[0][list(rows)] = tokens
        self._arrays[1][list(rows)] = pooled

    def save(self, num_done: int) -> None:
        """Have the rows of the first `num_done` images on the disk, then say so."""
        if self._arrays is not None:
            self._flush()
            progress = _Progress(num_done=num_done, unreadable=self.unreadable)
            write_file(self._folder / _PROGRESS, progress.model_dump_json())
        self.num_done = num_done

    def publish(self, place: Path, key: str, ids: Sequence[str]) -> None:
        """Give the complete draft its final name."""
        if self._arrays is None:
            raise FeaturesError(f"none of {self._num_images} images could be read: check where the images lie")
        self._flush()
        self._arrays = None
        index = _Index(key=key, ids=tuple(ids), unreadable=self.unreadable)
        write_file(self._folder / _INDEX, index.model_dump_json())
        (self._folder / _PROGRESS).unlink(missing_ok=True)
        replace_directory(self._folder, place)

    def _new(self, name: str, example: NDArray[np.floating]) -> NDArray[np.floating]:
        shape = (self._num_images, *example.shape[1:])
        array: NDArray[np.floating] = np.lib.format.open_memmap(self._folder / name, "w+", self._dtype, shape)
        return array

    def _resume(self) -> bool:
        try:
            progress = _Progress.model_validate_json((self._folder / _PROGRESS).read_bytes())
            for name in (_TOKENS, _POOLED):
                np.load(self._folder / name, mmap_mode="r")  # refuses a file that is cut off; "r+" makes it longer
            arrays = tuple(np.load(self._folder / name, mmap_mode="r+") for name in (_TOKENS, _POOLED))
        except (OSError, ValueError):  # of pydantic and of numpy, for what is not whole
            return False
        if any(len(array) != self._num_images or array.dtype != self._dtype for array in arrays):
            return False
        self._arrays = (arrays[0], arrays[1])
        self.num_done, self.unreadable = progress.num_done, dict(progress.unreadable)
        return True

    def _flush(self) -> None:
        for array in self._arrays or ():
            assert isinstance(array, np.memmap)
            array.flush()


def open_features(place: Path) -> Features:
    """Map a finished folder. Raises `FeaturesError`."""
    try:
        index = _Index.model_validate_json((place / _INDEX).read_bytes())
        tokens, pooled = (np.load(place / name, mmap_mode="r") for name in (_TOKENS, _POOLED))
    except (OSError, ValueError) as error:
        cause = "its index is not whole" if isinstance(error, ValidationError) else str(error)
        raise FeaturesError(f"{place} holds no whole features ({cause}): remove it to extract anew") from error
    if not len(tokens) == len(pooled) == len(index.ids):
        raise FeaturesError(f"{place} has other numbers of rows than of images: remove it to extract anew")
    return Features(index.key, index.ids, tokens, pooled, index.unreadable)

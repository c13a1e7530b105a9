"""A split as arrays: captions as ids, each with its image; and the features of the images, in one or several views.

Knows tokenizers and feature files; knows neither losses nor negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edje.data.dataset import DataError, Dataset
from edje.text import Tokenizer, canonical_caption


@dataclass(frozen=True, slots=True)
class Captions:
    """Captions in the dataset's order; `images` are numbers in the dataset, `keys` are equal for equal captions."""

    ids: NDArray[np.int32]  # (C, T), padded with zeros
    lengths: NDArray[np.int64]  # (C,), [CLS] and [SEP] included
    images: NDArray[np.int64]  # (C,)
    keys: NDArray[np.int64]  # (C,)

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(Q, T) ids and (Q,) lengths of these captions, no longer than the longest of them."""
        lengths = self.lengths[numbers]
        ids = self.ids[numbers, : lengths.max(initial=1)]
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(lengths)

    def words(self) -> list[list[int]]:
        """The ids of each caption without [CLS] and [SEP]."""
        return [row[1 : length - 1].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]


def read_captions(dataset: Dataset, tokenizer: Tokenizer, usable_images: NDArray[np.int64]) -> Captions:
    """Every caption of the usable images. Raises `DataError` if there is none."""
    is_usable = np.zeros(len(dataset.images), bool)
    is_usable[usable_images] = True
    texts: list[str] = []
    images: list[int] = []
    for number, image in enumerate(dataset.images):
        if is_usable[number]:
            texts.extend(image.captions)
            images.extend([number] * len(image.captions))
    if not texts:
        raise DataError(
            f"{dataset.name}: no image can be read, so there is nothing to train on. {dataset.problems.report()}"
        )
    encoded = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    ids = np.zeros((len(encoded), lengths.max()), np.int32)
    for row, caption in zip(ids, encoded, strict=True):
        row[: len(caption)] = caption
    numbers: dict[str, int] = {}
    keys = np.array([numbers.setdefault(canonical_caption(text), len(numbers)) for text in texts], np.int64)
    return Captions(ids, lengths, np.array(images, np.int64), keys)


class FeatureViews:
    """Patch tokens of the images, the picture itself first and then its crops, mapped from the disk."""

    def __init__(self, views: Sequence[NDArray[np.floating]]) -> None:
        self._views = views

    def __len__(self) -> int:
        return len(self._views)

    def rows(self, images: NDArray[np.int64], view: NDArray[np.int64]) -> Tensor:
        """(U,) image numbers, (U,) which view of each -> float32 (U, S, D)."""
        out = np.empty((len(images), *self._views[0].shape[1:]), np.float32)
        for number in np.unique(view):
            out[view == number] = self._views[number][images[view == number]]
        return torch.from_numpy(out)


class PixelRows:
    """Pixels instead of features, for a tower that is being trained."""

    def __init__(self, dataset: Dataset, size: int, resample: str) -> None:
        self._dataset = dataset
        self._size = size
        self._resample = resample

    def rows(self, images: NDArray[np.int64], view: NDArray[np.int64]) -> Tensor:
        """(U,) image numbers -> uint8 (U, 3, size, size); there is one view."""
        pixels = [self._dataset.pixels(int(number), self._size, self._resample) for number in images]  # type: ignore[arg-type]
        return torch.from_numpy(np.stack(pixels))

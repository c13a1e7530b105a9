"""A split as arrays: captions as ids, each with its image; and the features of the images, in one or several views.

Knows tokenizers and feature files; knows neither losses nor negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edje.data.dataset import DataError, Dataset, decode_images
from edje.features.extraction import DECODING_THREADS
from edje.features.storage import Features
from edje.images import Resample
from edje.text import Tokenizer, canonical_caption

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Captions:
    """Captions in the dataset's order; `images` are numbers in the dataset, `keys` are equal for equal captions."""

    texts: tuple[str, ...]
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

    def id_lists(self) -> list[list[int]]:
        """The ids of each caption."""
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]

    def words(self) -> list[list[int]]:
        """The ids of each caption without [CLS] and [SEP]."""
        return [ids[1:-1] for ids in self.id_lists()]


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
    return Captions(tuple(texts), ids, lengths, np.array(images, np.int64), keys)


class ImageRows(Protocol):
    """Where a batch's images come from."""

    @property
    def num_views(self) -> int: ...

    def rows(self, images: Ints, view: Ints) -> tuple[Tensor, Tensor | None]:
        """(U,) image numbers, (U,) which view of each -> what the model takes in, and the tower's pooled embeddings
        (U, E) where they are known already."""
        ...


class FeatureViews:
    """What a frozen tower saw in the pictures themselves, and then in crops of them, mapped from the disk."""

    def __init__(self, views: Sequence[Features]) -> None:
        self._views = views

    @property
    def num_views(self) -> int:
        return len(self._views)

    def rows(self, images: Ints, view: Ints) -> tuple[Tensor, Tensor]:
        """See `ImageRows`: float32 (U, S, D) and (U, E)."""
        first = self._views[0]
        tokens = np.empty((len(images), *first.tokens.shape[1:]), np.float32)
        pooled = np.empty((len(images), *first.pooled.shape[1:]), np.float32)
        for number in np.unique(view):
            chosen = view == number
            tokens[chosen] = self._views[number].tokens[images[chosen]]
            pooled[chosen] = self._views[number].pooled[images[chosen]]
        return torch.from_numpy(tokens), torch.from_numpy(pooled)


class PixelRows:
    """Pixels instead of features, for a tower that is being trained or whose features would not fit on the disk."""

    num_views = 1

    def __init__(self, dataset: Dataset, size: int, resample: Resample) -> None:
        self._dataset = dataset
        self._size = size
        self._resample = resample

    def rows(self, images: Ints, view: Ints) -> tuple[Tensor, None]:
        """See `ImageRows`: uint8 (U, 3, size, size)."""
        with ThreadPoolExecutor(DECODING_THREADS, "decode") as pool:
            pixels = list(pool.map(lambda each: self._dataset.pixels(int(each), self._size, self._resample), images))
        return torch.from_numpy(np.stack(pixels)), None


def decodable(dataset: Dataset, size: int, resample: Resample) -> Ints:
    """Numbers of the images that decode; the others are told to the dataset's problems. Reads every picture once."""
    decoded = decode_images(dataset, size, dataset.problems.record, resample=resample)
    return np.array([number for number, _ in decoded], np.int64)

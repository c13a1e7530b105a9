"""A split as arrays: captions as token ids, and images as features or pixels.

Knows neither losses nor negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from edje.images import ImageError, Resample
from edje.text import Tokenizer, canonical_caption
from edje.training.batches.negatives import Ints

#: Value of the pixels of an image that cannot be read.
_GREY = 127


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of a split, in the dataset's order.

    `images` are image indices in the dataset. `keys` are equal for captions with equal canonical text.
    """

    texts: tuple[str, ...]
    ids: NDArray[np.int32]  # (C, T), padded with zeros
    lengths: NDArray[np.int64]  # (C,), with [CLS] and [SEP]
    images: NDArray[np.int64]  # (C,)
    keys: NDArray[np.int64]  # (C,)

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, captions: Ints) -> tuple[Tensor, Tensor]:
        """Token ids (Q, T) and lengths (Q,) of some captions; T is the length of the longest of them."""
        lengths = self.lengths[captions]
        ids = self.ids[captions, : lengths.max(initial=1)]
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(lengths)

    def id_lists(self) -> list[list[int]]:
        """The token ids of each caption."""
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]

    def word_ids(self) -> list[list[int]]:
        """The token ids of each caption without [CLS] and [SEP]."""
        return [ids[1:-1] for ids in self.id_lists()]


def encode_captions(dataset: Dataset, tokenizer: Tokenizer, usable_images: Ints) -> Captions:
    """The captions of the usable images, given by index. Raises `DataError` if there are none."""
    is_usable = np.zeros(len(dataset.images), bool)
    is_usable[usable_images] = True
    texts: list[str] = []
    images: list[int] = []
    for index, image in enumerate(dataset.images):
        if is_usable[index]:
            texts.extend(image.captions)
            images.extend([index] * len(image.captions))
    if not texts:
        raise DataError(f"{dataset.name}: no image can be read. {dataset.problems.report()} Check the image files.")
    encoded = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    ids = np.zeros((len(encoded), lengths.max()), np.int32)
    for row, caption in zip(ids, encoded, strict=True):
        row[: len(caption)] = caption
    key_of: dict[str, int] = {}
    keys = np.array([key_of.setdefault(canonical_caption(text), len(key_of)) for text in texts], np.int64)
    return Captions(tuple(texts), ids, lengths, np.array(images, np.int64), keys)


class ImageSource(Protocol):
    """Supplies the images of a batch, as features or as pixels."""

    @property
    def num_views(self) -> int:
        """The number of views of each image, the image itself included."""
        ...

    def batch(self, images: Ints, views: Ints) -> tuple[Tensor, Tensor | None]:
        """The model's input for image indices (U,) and a view of each (U,), and their pooled embeddings (U, E).

        The pooled embeddings are None where the tower has yet to compute them.
        """
        ...


class FeatureImages:
    """Stored features of a frozen tower; the first view is the image, the others are augmented."""

    def __init__(self, views: Sequence[Features]) -> None:
        self._views = views

    @property
    def num_views(self) -> int:
        """See `ImageSource`."""
        return len(self._views)

    def batch(self, images: Ints, views: Ints) -> tuple[Tensor, Tensor]:
        """See `ImageSource`: patch tokens, float32 (U, S, D), and pooled embeddings (U, E)."""
        first = self._views[0]
        tokens = np.empty((len(images), *first.tokens.shape[1:]), np.float32)
        pooled = np.empty((len(images), *first.pooled.shape[1:]), np.float32)
        for view in np.unique(views):
            is_view = views == view
            tokens[is_view] = self._views[view].tokens[images[is_view]]
            pooled[is_view] = self._views[view].pooled[images[is_view]]
        return torch.from_numpy(tokens), torch.from_numpy(pooled)


class PixelImages:
    """Pixels, for a tower that is trained or whose features are too large to store.

    An image that can no longer be read is grey, and is reported once: one lost file does not end a run.
    """

    num_views = 1

    def __init__(
        self, dataset: Dataset, size: int, resample: Resample, on_unreadable: Callable[[str, str], None]
    ) -> None:
        """`on_unreadable` is called with the id of an image that cannot be read, and the cause."""
        self._dataset = dataset
        self._size = size
        self._resample = resample
        self._on_unreadable = on_unreadable
        self._reported: set[int] = set()
        self._pool = ThreadPoolExecutor(DECODING_THREADS, "decode")

    def batch(self, images: Ints, views: Ints) -> tuple[Tensor, None]:
        """See `ImageSource`: uint8 (U, 3, size, size)."""
        return torch.from_numpy(np.stack(list(self._pool.map(self._pixels, images.tolist())))), None

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        try:
            return self._dataset.pixels(index, self._size, self._resample)
        except ImageError as error:
            if index not in self._reported:
                self._reported.add(index)
                self._on_unreadable(self._dataset.images[index].image_id, str(error))
            return np.full((3, self._size, self._size), _GREY, np.uint8)


def decodable_images(dataset: Dataset, size: int, resample: Resample) -> Ints:
    """Indices of the images that can be decoded; the others are recorded in `dataset.problems`. Reads every image."""
    decoded = decode_images(dataset, size, dataset.problems.record, resample=resample)
    return np.array([index for index, _ in decoded], np.int64)

"""Augmented views of a dataset's images: crops and mirror images.

Deterministic: a view of an image is always the same, so its features can be stored.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edje.data.dataset import Dataset
from edje.images import Resample

#: Range of a crop's share of the image area, and the largest factor by which its aspect ratio changes.
_CROP_AREA = (0.45, 0.95)
_MAX_STRETCH = 1.25


def view_of(dataset: Dataset, number: int, *, may_mirror: bool = True) -> Dataset:
    """View `number` of every image: 0 is the image, 1 its mirror image, any other a crop, half of them mirrored.

    `may_mirror` is False where captions distinguish left and right.
    """
    if number == 0:
        return dataset
    name = f"{dataset.fingerprint} view {number} {may_mirror}"
    return replace(
        dataset,
        name=f"{dataset.name} (view {number})",
        fingerprint=hashlib.sha256(name.encode()).hexdigest()[:16],
        source=_ViewSource(dataset, number, may_mirror),
    )


class _ViewSource:
    def __init__(self, dataset: Dataset, number: int, may_mirror: bool) -> None:
        self._dataset = dataset
        self._number = number
        self._may_mirror = may_mirror

    def image_key(self, index: int) -> str:
        return self._of_view(self._dataset.image_key(index), index)

    def content_key(self, index: int) -> str:
        return self._of_view(self._dataset.content_key(index), index)

    def _of_view(self, key: str, index: int) -> str:
        return f"{key} view {self._number} {self._may_mirror} {self._seed(index)}"

    def _seed(self, index: int) -> int:
        """Return the seed of an image's crops. It depends on the image's id alone, not on other images."""
        digest = hashlib.sha256(self._dataset.images[index].image_id.encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big")

    def pixels(self, index: int, size: int, resample: Resample) -> NDArray[np.uint8]:
        image = Image.fromarray(self._dataset.pixels(index, size, resample).transpose(1, 2, 0))
        rng = np.random.default_rng([self._number, self._seed(index)])
        is_crop = self._number > 1 or not self._may_mirror
        if is_crop:
            area = rng.uniform(*_CROP_AREA)
            stretch = _MAX_STRETCH ** rng.uniform(-1, 1)
            width, height = (size * min(1.0, np.sqrt(area * ratio)) for ratio in (stretch, 1 / stretch))
            left, top = rng.uniform(0, size - width), rng.uniform(0, size - height)
            box = (left, top, left + width, top + height)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        if self._may_mirror and (not is_crop or rng.random() < 0.5):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

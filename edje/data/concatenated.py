"""Joins several datasets into one, in their order. Knows nothing of their formats."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from edje.data.dataset import CaptionedImage, DataError, Dataset, JudgedPair, Problems
from edje.images import Resample

_FINGERPRINT_CHARS = 16


@dataclass(frozen=True, slots=True)
class _ConcatenatedSource:
    parts: tuple[Dataset, ...]
    starts: tuple[int, ...]  # index of each part's first image

    def pixels(self, index: int, size: int, resample: Resample) -> NDArray[np.uint8]:
        part, within = self._part(index)
        return part.pixels(within, size, resample)

    def image_key(self, index: int) -> str:
        part, within = self._part(index)
        return part.image_key(within)

    def content_key(self, index: int) -> str:
        part, within = self._part(index)
        return part.content_key(within)

    def _part(self, index: int) -> tuple[Dataset, int]:
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]


def concatenate(parts: Mapping[str, Dataset], name: str) -> Dataset:
    """One dataset of all parts. A part's name is the prefix of its image ids and groups. Raises `DataError`."""
    if not parts:
        raise DataError(f"no dataset has images for {name}: check train_only")
    problems, images, judged, digest = Problems(), list[CaptionedImage](), list[JudgedPair](), hashlib.sha256()
    for part_name, part in parts.items():
        problems.add(part.problems, f"{part_name}/")
        digest.update(f"{part_name}\0{part.fingerprint}\n".encode())
        for image in part.images:
            group = None if image.group is None else f"{part_name}/{image.group}"
            images.append(replace(image, image_id=f"{part_name}/{image.image_id}", group=group))
        judged += [replace(pair, image_id=f"{part_name}/{pair.image_id}") for pair in part.judged]
    starts = (0, *accumulate(len(part.images) for part in parts.values()))[:-1]
    return Dataset(
        f"{' + '.join(parts)} {name}",
        tuple(images),
        problems,
        digest.hexdigest()[:_FINGERPRINT_CHARS],
        _ConcatenatedSource(tuple(parts.values()), starts),
        tuple(judged),
    )

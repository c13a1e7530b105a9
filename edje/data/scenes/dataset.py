"""A dataset of drawn scenes, in groups of images whose captions combine the same words in different ways.

    from edje.data.scenes.dataset import scenes
    train = scenes("train", seed=0, num_groups=5_000)    # 20,000 images, 100,000 captions

A hash of a scene's words decides its split. Scenes with the same words are therefore in the same split, for every seed.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edje.data.dataset import SPLITS, CaptionedImage, DataError, Dataset, GroundingLabel, Problems, Split
from edje.data.scenes.captions import SceneCaption, draw_captions, grounding_labels
from edje.data.scenes.drawing import draw
from edje.data.scenes.random_draws import RandomDraws
from edje.data.scenes.world import (
    COLOURS,
    GRID,
    PATTERNS,
    SHAPES,
    SIZES,
    SWAPS,
    Scene,
    Swap,
    draw_confusers,
    draw_scene,
    word_bag,
)
from edje.images import Resample

#: Eight of ten random scenes are for training.
_SPLIT_OF_TENTH: Final[tuple[Split, ...]] = ("train",) * 8 + ("dev", "test")
#: The numbers of objects of a scene. Two give little information, four make long captions.
_NUM_THINGS: Final = (2, 3, 3, 3, 4, 4)
_CONFUSERS: Final = 3
#: The region labels and their values.
_LABELS: Final = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS, "size": SIZES}
_CAPTIONS_PER_IMAGE: Final = 5
#: A test scene takes about ten attempts, more where a group needs long captions.
_MAX_ATTEMPTS: Final = 5_000
#: Images whose pixels are part of the fingerprint, so that it changes with the drawing code.
_NUM_FINGERPRINTED: Final = 12
_FINGERPRINT_SIZE: Final = 64
_FINGERPRINT_CHARS: Final = 16


@dataclass(frozen=True, slots=True)
class DescribedScene:
    """A scene with its captions."""

    scene: Scene
    captions: tuple[SceneCaption, ...]


@dataclass(frozen=True, slots=True)
class _DrawnSource:
    """Draws the pixels on every call, which takes about as long as decoding a file. Does not resample."""

    scenes: tuple[Scene, ...]
    key: tuple[int, ...]

    def pixels(self, index: int, size: int, resample: Resample = "bilinear") -> NDArray[np.uint8]:
        return draw(self.scenes[index], size, *self.key, index)

    def image_key(self, index: int) -> str:
        """The scene, the key of the drawing and some pixels that the drawing code makes."""
        return f"{drawing_digest()} {self.key} {index} {self.scenes[index]}"

    def content_key(self, index: int) -> str:
        return self.image_key(index)

    @property
    def label_sizes(self) -> tuple[int, ...]:
        return tuple(len(values) + 1 for values in _LABELS.values())

    @property
    def num_regions(self) -> int:
        return GRID * GRID

    def labels(self, index: int) -> NDArray[np.int64]:
        """For each cell the attributes of its object, 0 where it has none."""
        cells = np.zeros((self.num_regions, len(_LABELS)), np.int64)
        for thing in self.scenes[index].things:
            cells[thing.row * GRID + thing.column] = [
                values.index(getattr(thing, name)) + 1 for name, values in _LABELS.items()
            ]
        return cells

    def grounding_labels(self, index: int, caption: str) -> list[GroundingLabel]:
        return grounding_labels(caption, self.scenes[index])


@cache
def drawing_digest() -> str:
    """A digest of a few drawn images, which changes with the drawing code."""
    digest = hashlib.sha256()
    for number in range(_NUM_FINGERPRINTED):
        scene = draw_scene(RandomDraws(number), _NUM_THINGS[number % len(_NUM_THINGS)])
        digest.update(draw(scene, _FINGERPRINT_SIZE, number).tobytes())
    return digest.hexdigest()[:_FINGERPRINT_CHARS]


def split_of(scene: Scene) -> Split:
    """The split of a scene."""
    digest = hashlib.sha256(word_bag(scene).encode()).digest()
    return _SPLIT_OF_TENTH[int.from_bytes(digest[:8], "big") % len(_SPLIT_OF_TENTH)]


def draw_groups(
    split: Split, seed: int, confusers: int = _CONFUSERS, swaps: tuple[Swap, ...] = SWAPS
) -> Iterator[tuple[DescribedScene, ...]]:
    """Yield groups endlessly, the same for the same arguments. No scene occurs twice.

    A group is a base scene and its confusers. Every caption holds for its scene and for no other scene of the group.
    Raises `DataError` if no scene has this many confusers.
    """
    seen: set[Scene] = set()
    num_attempts = 0
    for number in count():
        if num_attempts == _MAX_ATTEMPTS:
            raise DataError(
                f"no further scene has {confusers} confusers by the swaps {', '.join(swaps) or '(none)'}: set fewer "
                "confusers or groups, or more swaps"
            )
        num_attempts += 1
        draws = RandomDraws(seed, SPLITS.index(split), number)
        base = draw_scene(draws, draws.pick(_NUM_THINGS))
        if split_of(base) != split:
            continue
        others = draw_confusers(draws, base, confusers, swaps)
        if others is None or not seen.isdisjoint((base, *others)):
            continue
        group = (base, *others)
        described = []
        for scene in group:
            rest = [other for other in group if other is not scene]
            captions = draw_captions(draws, scene, rest, _CAPTIONS_PER_IMAGE)
            if captions is not None:
                described.append(DescribedScene(scene, tuple(captions)))
        if len(described) == len(group):
            seen.update(group)
            num_attempts = 0
            yield tuple(described)


def scenes(
    split: Split, seed: int, num_groups: int, confusers: int = _CONFUSERS, swaps: tuple[Swap, ...] = SWAPS
) -> Dataset:
    """`num_groups` x (1 + `confusers`) images with five captions each. Fewer groups are a prefix of more."""
    return _dataset(split, seed, list(islice(draw_groups(split, seed, confusers, swaps), num_groups)))


def holdout(num_images: int, seed: int = 0, split: Split = "test") -> Dataset:
    """Exactly `num_images` images, by default of scenes that are never used for training. The last group may be cut."""
    groups = draw_groups(split, seed)
    return _dataset(split, seed, [next(groups) for _ in range(-(-num_images // (1 + _CONFUSERS)))], num_images)


def write_scenes(folder: Path, split: Split, num_images: int, seed: int = 0, size: int = 256) -> Path:
    """Write PNG files and a table for `edje.data.caption_table`. Returns the path of the table.

    Raises `DataError` unless the folder is new or empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty: remove it or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    dataset = holdout(num_images, seed, split)
    table = folder / "captions.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption", "split"))
        for index, image in enumerate(dataset.images):
            name = f"{image.image_id}.png"
            Image.fromarray(dataset.pixels(index, size).transpose(1, 2, 0)).save(folder / name)
            writer.writerows((name, caption, split) for caption in image.captions)
    return table


def _dataset(
    split: Split, seed: int, groups: Sequence[tuple[DescribedScene, ...]], num_images: int | None = None
) -> Dataset:
    described, images = [], []
    for number, group in enumerate(groups):
        group_id = f"{split}-{seed}-{number}"
        for member, scene in enumerate(group):
            captions = tuple(caption.text for caption in scene.captions)
            images.append(CaptionedImage(f"{group_id}-{member}", captions, group_id))
            described.append(scene.scene)
    images, described = images[:num_images], described[:num_images]
    source = _DrawnSource(tuple(described), (seed, SPLITS.index(split)))
    return Dataset(f"scenes {split}", tuple(images), Problems(), _fingerprint(images, source), source)


def _fingerprint(images: list[CaptionedImage], source: _DrawnSource) -> str:
    digest = hashlib.sha256()
    for image, scene in zip(images, source.scenes, strict=True):
        digest.update(f"{image.image_id} {scene}\n".encode())
    for index in range(min(_NUM_FINGERPRINTED, len(images))):
        digest.update(source.pixels(index, _FINGERPRINT_SIZE).tobytes())
    return digest.hexdigest()[:_FINGERPRINT_CHARS]

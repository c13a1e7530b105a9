"""Scenes that the project draws itself: groups of pictures made of the same words, told apart only by how the words
belong together.

    from edje.data.scenes.dataset import scenes
    train = scenes("train", seed=0, num_groups=5_000)    # 20,000 images, 100,000 captions

A split is a property of the scene, not of the seed: a digest of its words decides it, so that no scene of one split,
nor any other arrangement of its words, is ever met in another split.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edje.data.dataset import SPLITS, CaptionedImage, Claim, DataError, Dataset, Problems, Split
from edje.data.scenes.captions import SceneCaption, claims, draw_captions
from edje.data.scenes.drawing import draw
from edje.data.scenes.random_draws import Dice
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

#: Of ten scenes drawn at random, eight are for training.
_SPLIT_OF_TENTH: Final[tuple[Split, ...]] = ("train",) * 8 + ("dev", "test")
#: How many things a scene has; two leave little to say, four make long captions.
_NUM_THINGS: Final = (2, 3, 3, 3, 4, 4)
_CONFUSERS: Final = 3
#: What is known of each cell of a picture.
_LABELS: Final = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS, "size": SIZES}
_CAPTIONS_PER_IMAGE: Final = 5
#: A test scene takes ten tries, and several where a group's captions must be long.
_MAX_TRIES: Final = 5_000
#: So many pictures stand for the drawing code in the fingerprint.
_NUM_FINGERPRINTED: Final = 12
_FINGERPRINT_SIZE: Final = 64
_FINGERPRINT_CHARS: Final = 16


@dataclass(frozen=True, slots=True)
class DescribedScene:
    """A scene with its captions."""

    scene: Scene
    captions: tuple[SceneCaption, ...]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Draws the pixels anew each time: that takes about as long as decoding a file would. Nothing is resampled."""

    scenes: tuple[Scene, ...]
    key: tuple[int, ...]

    def pixels(self, index: int, size: int, resample: Resample = "bilinear") -> NDArray[np.uint8]:
        return draw(self.scenes[index], size, *self.key, index)

    @property
    def label_sizes(self) -> tuple[int, ...]:
        return tuple(len(values) + 1 for values in _LABELS.values())

    @property
    def num_regions(self) -> int:
        return GRID * GRID

    def labels(self, index: int) -> NDArray[np.int64]:
        """Of each cell the attributes of the thing in it, 0 where there is none."""
        cells = np.zeros((self.num_regions, len(_LABELS)), np.int64)
        for thing in self.scenes[index].things:
            cells[thing.row * GRID + thing.column] = [
                values.index(getattr(thing, name)) + 1 for name, values in _LABELS.items()
            ]
        return cells

    def claims(self, index: int, caption: str) -> list[Claim]:
        return claims(caption, self.scenes[index])


def split_of(scene: Scene) -> Split:
    """The only split in which this scene can occur."""
    digest = hashlib.sha256(word_bag(scene).encode()).digest()
    return _SPLIT_OF_TENTH[int.from_bytes(digest[:8], "big") % len(_SPLIT_OF_TENTH)]


def draw_groups(
    split: Split, seed: int, confusers: int = _CONFUSERS, swaps: tuple[Swap, ...] = SWAPS
) -> Iterator[tuple[DescribedScene, ...]]:
    """Groups without end, the same for the same arguments; no scene comes twice.

    Each group is a base scene and its confusers. Every caption is true of its own scene and of no other in the group.
    Raises `DataError` where scenes of this world do not have so many confusers.
    """
    seen: set[Scene] = set()
    num_tries = 0
    for number in count():
        if num_tries == _MAX_TRIES:
            raise DataError(
                f"no further scene has {confusers} confusers by exchange of {', '.join(swaps) or 'nothing'}: "
                "ask for fewer, or for more kinds of exchange"
            )
        num_tries += 1
        dice = Dice(seed, SPLITS.index(split), number)
        base = draw_scene(dice, dice.pick(_NUM_THINGS))
        if split_of(base) != split:
            continue
        others = draw_confusers(dice, base, confusers, swaps)
        if others is None or not seen.isdisjoint((base, *others)):
            continue
        group = (base, *others)
        described = []
        for scene in group:
            rest = [other for other in group if other is not scene]
            captions = draw_captions(dice, scene, rest, _CAPTIONS_PER_IMAGE)
            if captions is not None:
                described.append(DescribedScene(scene, tuple(captions)))
        if len(described) == len(group):
            seen.update(group)
            num_tries = 0
            yield tuple(described)


def scenes(
    split: Split, seed: int, num_groups: int, confusers: int = _CONFUSERS, swaps: tuple[Swap, ...] = SWAPS
) -> Dataset:
    """`num_groups` x (1 + `confusers`) images with five captions each; fewer groups are the beginning of more."""
    return _dataset(split, seed, list(islice(draw_groups(split, seed, confusers, swaps), num_groups)))


def holdout(num_images: int, seed: int = 0, split: Split = "test") -> Dataset:
    """Exactly so many images, by default of scenes that no training ever sees; the last group may be cut."""
    groups = draw_groups(split, seed)
    return _dataset(split, seed, [next(groups) for _ in range(-(-num_images // (1 + _CONFUSERS)))], num_images)


def write_scenes(folder: Path, split: Split, num_images: int, seed: int = 0, size: int = 256) -> Path:
    """Export as PNG files and a table that `edje.data.caption_table` reads, whose path is returned.

    Raises `DataError` unless the folder is new or empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists: remove it or choose another folder")
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
    source = _Drawn(tuple(described), (seed, SPLITS.index(split)))
    return Dataset(f"scenes {split}", tuple(images), Problems(), _fingerprint(images, source), source)


def _fingerprint(images: list[CaptionedImage], source: _Drawn) -> str:
    digest = hashlib.sha256()
    for image, scene in zip(images, source.scenes, strict=True):
        digest.update(f"{image.image_id} {scene}\n".encode())
    for index in range(min(_NUM_FINGERPRINTED, len(images))):
        digest.update(source.pixels(index, _FINGERPRINT_SIZE).tobytes())
    return digest.hexdigest()[:_FINGERPRINT_CHARS]

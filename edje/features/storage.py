"""Stores features on the disk in shards, each image under a key of its pixels. Knows neither towers nor datasets.

    FOLDER/SHARD/images.npy        (n, 2) the image key and the content key of each row
    FOLDER/SHARD/tokens.npy        (n, S, D) patch tokens, float16
    FOLDER/SHARD/pooled.npy        (n, E) pooled embeddings, float16
    FOLDER/SHARD/unreadable.json   cause by image key, for images without a row

An image key changes whenever the pixels may have changed (a file's name, size or time), a content key only with the
content. A shard is written atomically and never changed, so several processes can write to one folder at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from edje.files import draft_directory

Keys = NDArray[np.uint64]
Half = NDArray[np.float16]

_IMAGES, _TOKENS, _POOLED, _UNREADABLE = "images.npy", "tokens.npy", "pooled.npy", "unreadable.json"
#: Shards whose arrays are mapped at a time; each takes a file descriptor.
_MAX_MAPPED = 256


class FeaturesError(Exception):
    """Features cannot be extracted or read; the message says what to do."""


def key_of(identity: str) -> int:
    """The first 64 bits of a text's SHA-256. Among a billion images, two have the same key with a chance of 3 %."""
    return int.from_bytes(hashlib.sha256(identity.encode(errors="surrogatepass")).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why an image has no features. A temporary cause is tried again by the next extraction."""

    cause: str
    is_temporary: bool = False


class _UnreadableFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    images: dict[int, Unreadable]


class ShardedRows:
    """An array whose rows are in the shards of a store; a row without a shard is zero."""

    def __init__(self, shards: Sequence[Path], shard_of: NDArray[np.int32], row_of: NDArray[np.int32]) -> None:
        """`shard_of` (N,) are indices of `shards`, -1 for a missing row; `row_of` (N,) are rows of the shards."""
        self._shards = shards
        self._shard_of = shard_of
        self._row_of = row_of
        self._mapped = lru_cache(_MAX_MAPPED)(lambda shard: np.load(self._shards[shard], mmap_mode="r"))
        first: Half = self._mapped(int(shard_of.max()))
        self.shape = (len(shard_of), *first.shape[1:])
        self.dtype = first.dtype

    def __len__(self) -> int:
        return len(self._shard_of)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Half:
        """Copies of some rows."""
        shards, within = self._shard_of[rows], self._row_of[rows]
        out = np.zeros((len(shards), *self.shape[1:]), self.dtype)
        for shard in np.unique(shards):
            if shard >= 0:
                is_here = shards == shard
                out[is_here] = self._mapped(int(shard))[within[is_here]]
        return out


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a dataset. Row i belongs to image i; only the rows in `rows` have a value."""

    ids: tuple[str, ...]
    tokens: ShardedRows  # (N, S, D)
    pooled: Half  # (N, E)
    unreadable: dict[int, str]  # cause by image index

    @property
    def rows(self) -> NDArray[np.int64]:
        """Indices of the images that have features, in ascending order."""
        is_readable = np.ones(len(self.ids), bool)
        is_readable[list(self.unreadable)] = False
        return np.flatnonzero(is_readable)


class FeatureStore:
    """The shards of one folder, as they are when the store is opened."""

    def __init__(self, folder: Path) -> None:
        """Raises `FeaturesError` for a damaged shard."""
        self._shards: list[Path] = []
        keys: list[Keys] = []
        self.unreadable: dict[int, Unreadable] = {}
        for shard in sorted(folder.glob("[0-9a-f]*")):
            try:
                images = np.load(shard / _IMAGES)
                found = _UnreadableFile.model_validate_json((shard / _UNREADABLE).read_bytes())
                for name in (_TOKENS, _POOLED) if len(images) else ():
                    if len(np.load(shard / name, mmap_mode="r")) != len(images):
                        raise ValueError(f"{name} has another number of rows")
            except (OSError, ValueError) as error:
                cause = f"{_UNREADABLE} is damaged" if isinstance(error, ValidationError) else str(error)
                raise FeaturesError(f"{shard} is damaged ({cause}): remove this folder to extract it again") from error
            self._shards.append(shard)
            keys.append(images.reshape(-1, 2))
            for key, each in found.images.items():
                if not each.is_temporary or key not in self.unreadable:
                    self.unreadable[key] = each
        all_keys = np.concatenate([*keys, np.empty((0, 2), np.uint64)])
        self._by_image, self._by_content = _KeyIndex(all_keys[:, 0]), _KeyIndex(all_keys[:, 1])
        self._shard_of = np.repeat(np.arange(len(keys), dtype=np.int32), [len(each) for each in keys])
        self._row_of = np.concatenate([*(np.arange(len(each), dtype=np.int32) for each in keys), np.empty(0, np.int32)])

    def positions(self, image_keys: Keys) -> NDArray[np.int64]:
        """Positions of images among all rows of the store, by image key (N,); -1 for an image without a row."""
        return self._by_image.find(image_keys)

    def positions_of_content(self, content_keys: Keys) -> NDArray[np.int64]:
        """The same by content key."""
        return self._by_content.find(content_keys)

    def features(self, ids: Sequence[str], positions: NDArray[np.int64], unreadable: dict[int, str]) -> Features:
        """The features of images by their positions (N,); -1 only for the unreadable ones."""
        shard_of = np.where(positions < 0, -1, self._shard_of[positions]).astype(np.int32)
        row_of = np.where(positions < 0, 0, self._row_of[positions]).astype(np.int32)
        tokens = ShardedRows([shard / _TOKENS for shard in self._shards], shard_of, row_of)
        pooled = ShardedRows([shard / _POOLED for shard in self._shards], shard_of, row_of)
        return Features(tuple(ids), tokens, pooled[:], unreadable)

    def rows_at(self, positions: NDArray[np.int64]) -> tuple[Half, Half]:
        """Patch tokens and pooled embeddings at these positions."""
        features = self.features((), positions, {})
        return features.tokens[:], features.pooled


class _KeyIndex:
    """Finds keys in an array."""

    def __init__(self, keys: Keys) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def find(self, wanted: Keys) -> NDArray[np.int64]:
        """The position of each wanted key, -1 for a key that is missing."""
        if not len(self._sorted):
            return np.full(len(wanted), -1)
        found = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[found] == wanted, self._order[found], -1)


def write_shard(
    folder: Path,
    images: Keys,
    tokens: Half | None,
    pooled: Half | None,
    unreadable: Mapping[int, Unreadable],
) -> None:
    """Write rows with their keys (n, 2), and the unreadable images by image key. Arrays are None without rows.

    The name of the shard is a digest of its keys, so that a repeated attempt replaces an unfinished one.
    """
    digest = hashlib.sha256(images.tobytes() + repr(sorted(unreadable)).encode()).hexdigest()
    with draft_directory(folder / digest[:16]) as draft:
        np.save(draft / _IMAGES, images)
        if tokens is not None and pooled is not None:
            np.save(draft / _TOKENS, tokens)
            np.save(draft / _POOLED, pooled)
        found = _UnreadableFile(images=dict(unreadable))
        (draft / _UNREADABLE).write_text(found.model_dump_json(), encoding="utf-8")

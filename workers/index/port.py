"""The port of the image index: the vectors and metadata of one model's images, searched by cosine.

`workers.index.client` implements it over Postgres, `workers.index.memory` in memory; one contract suite tests both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protocols.source_position import SourcePosition

#: A vector of unit length in float32.
Vector = NDArray[np.float32]
#: For each metadata key the accepted values; an image must have one of them.
Filter = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True, eq=False)
class ImageRow:
    """A change that stores an image. `vector=None` keeps the stored vector if the image's content is unchanged."""

    image_id: str
    position: SourcePosition
    content_sha256: str
    vector: Vector | None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RemovedImage:
    """The removal of an image from the index."""

    image_id: str
    position: SourcePosition


Change = ImageRow | RemovedImage


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An image near a query vector; `score` is the cosine, in [-1, 1]."""

    image_id: str
    score: float
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class IndexedImage:
    """One image in the index, without its vector."""

    image_id: str
    content_sha256: str
    metadata: Mapping[str, str]


class ImageIndex(Protocol):
    """The images of one model.

    Every call raises `Transient` if the database cannot be reached and `Misconfigured` if it refuses the access.
    """

    def apply(self, changes: Sequence[Change]) -> frozenset[str]:
        """Write changes to distinct images, all or none; returns the images left out because they have no vector.

        A change older than the stored row of its image has no effect. Raises `Poison` for a row that the database
        cannot hold.
        """
        ...

    def nearest(self, vector: Vector, limit: int, matching: Filter) -> list[Neighbour]:
        """Return at most `limit` images, highest cosine first, whose metadata matches every key of the filter."""
        ...

    def find(self, image_ids: Sequence[str]) -> list[IndexedImage | None]:
        """Return one entry per id in order, None for an image that is not in the index."""
        ...

    def ids_of(self, key: str, values: Sequence[str]) -> list[str | None]:
        """Return for each value the id of an image whose metadata has it, None if no image has it."""
        ...

    def count(self) -> int:
        """Return the number of images."""
        ...

    def ping(self) -> None:
        """Check that the database answers and can hold the index."""
        ...

    def close(self) -> None: ...

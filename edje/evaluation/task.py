"""A retrieval task: queries, candidates, first-stage similarities, and which candidates are positives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.calibration import Direction
from edje.evaluation.errors import TaskInvalid


@dataclass(frozen=True, slots=True)
class RetrievalTask:
    """One direction of retrieval. Queries of one `cluster` share an image and are resampled together.

    Raises `TaskInvalid` for similarities that are not finite, a query without a positive, or indices out of range.
    """

    direction: Direction
    similarity: NDArray[np.float32]  # (queries, candidates), from the first stage
    positive_query: NDArray[np.int64]  # (positives,)
    positive_candidate: NDArray[np.int64]  # (positives,)
    cluster: NDArray[np.int64]  # (queries,)

    def __post_init__(self) -> None:
        if self.similarity.ndim != 2 or 0 in self.similarity.shape:
            raise TaskInvalid(f"similarities of shape {self.similarity.shape}; expected (queries, candidates)")
        num_queries, num_candidates = self.similarity.shape
        if self.cluster.shape != (num_queries,):
            raise TaskInvalid(f"{self.cluster.shape} clusters for {num_queries} queries")
        if self.positive_query.ndim != 1 or self.positive_query.shape != self.positive_candidate.shape:
            raise TaskInvalid("a positive is one query and one candidate; the two lists differ in length")
        for kind, indices, size in (
            ("query", self.positive_query, num_queries),
            ("candidate", self.positive_candidate, num_candidates),
        ):
            if indices.size and not 0 <= indices.min() <= indices.max() < size:
                raise TaskInvalid(f"a positive names a {kind} outside 0..{size - 1}")
        pairs = self.positive_query * num_candidates + self.positive_candidate
        if len(np.unique(pairs)) != len(pairs):
            raise TaskInvalid("a positive is named twice: it would count twice in nDCG")
        without = np.flatnonzero(np.bincount(self.positive_query, minlength=num_queries) == 0)
        if without.size:
            raise TaskInvalid(f"query {without[0]} has no positive ({without.size} such queries)")
        for query, row in enumerate(self.similarity):  # by row: no second matrix of this size
            if not np.isfinite(row).all():
                candidate = int(np.flatnonzero(~np.isfinite(row))[0])
                raise TaskInvalid(
                    f"the first stage's similarity of query {query} and candidate {candidate} is {row[candidate]}"
                )

    @property
    def num_queries(self) -> int:
        return int(self.similarity.shape[0])

    @property
    def num_candidates(self) -> int:
        return int(self.similarity.shape[1])

    def is_positive(self, candidates: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `(queries, k)` candidates, a row per query, are positives of their query."""
        positives = self.positive_query * self.num_candidates + self.positive_candidate
        rows = np.arange(self.num_queries)[:, None] * self.num_candidates
        return np.isin(rows + candidates, positives)


def text_to_image(
    similarity: NDArray[np.float32],
    image_of_caption: NDArray[np.int64],
    group_of_image: NDArray[np.int64] | None = None,
) -> RetrievalTask:
    """The task of (captions, images) similarities in which each caption is a query and its image the one positive.

    Images of one group were made to be confused with each other; their captions are resampled together.
    """
    _check_shapes(similarity, image_of_caption)
    captions = np.arange(len(image_of_caption))
    groups = np.arange(similarity.shape[1]) if group_of_image is None else group_of_image
    return RetrievalTask("text-to-image", similarity, captions, image_of_caption, cluster=groups[image_of_caption])


def image_to_text(
    similarity: NDArray[np.float32],
    image_of_caption: NDArray[np.int64],
    group_of_image: NDArray[np.int64] | None = None,
) -> RetrievalTask:
    """The task of (captions, images) similarities in which each image is a query and all its captions are positives.

    Groups are those of `text_to_image`.
    """
    _check_shapes(similarity, image_of_caption)
    captions = np.arange(len(image_of_caption))
    transposed = np.ascontiguousarray(similarity.T)
    groups = np.arange(len(transposed)) if group_of_image is None else group_of_image
    return RetrievalTask("image-to-text", transposed, image_of_caption, captions, cluster=groups)


def refuse_depth(k: int, num_candidates: int) -> None:
    """Raise `TaskInvalid` for a k that is not between 1 and the number of candidates."""
    if not 1 <= k <= num_candidates:
        raise TaskInvalid(f"k = {k} with {num_candidates} candidates: choose k from 1 to {num_candidates}")


def _check_shapes(similarity: NDArray[np.float32], image_of_caption: NDArray[np.int64]) -> None:
    if similarity.ndim != 2 or len(similarity) != len(image_of_caption):
        raise TaskInvalid(
            f"similarities of shape {similarity.shape} for {len(image_of_caption)} captions: "
            "expected one row per caption, one column per image"
        )
    if image_of_caption.size and not 0 <= image_of_caption.min() <= image_of_caption.max() < similarity.shape[1]:
        raise TaskInvalid(f"a caption belongs to an image outside 0..{similarity.shape[1] - 1}")

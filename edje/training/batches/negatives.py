"""Negative pairs: which images are negatives of a caption, and which captions of an image. Never a positive pair.

Pure functions of similarities and indices. A caption's positives are its image and the images of every equal caption;
an image's positives are the same pairs, read the other way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
#: Index of a negative that does not exist, because every other item is positive.
MISSING = -1

#: Captions (B,) and images (B,) of a batch -> images (B, n) for each caption, captions (B, n) for each image.
NegativeSampler = Callable[[Ints, Ints, np.random.Generator], tuple[Ints, Ints]]


class Positives:
    """The positive pairs of a whole corpus.

    A batch alone does not suffice: two of its images may share a caption that is not in the batch.
    """

    def __init__(self, caption_keys: Ints, caption_images: Ints) -> None:
        """`caption_keys` (C,) are equal for equal captions; `caption_images` (C,) are their images."""
        self._keys, self._images = caption_keys, caption_images
        pairs = np.unique(np.stack((caption_keys, caption_images), axis=1), axis=0)
        keys, starts, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
        # Few captions have several positive images; for the others it is enough to compare the image index.
        self._images_of_key = {
            int(key): pairs[start : start + count, 1]
            for key, start, count in zip(keys, starts, counts, strict=True)
            if count > 1
        }
        self._is_shared = np.isin(caption_keys, list(self._images_of_key))

    def matrix(self, captions: Ints, images: Ints) -> NDArray[np.bool_]:
        """Whether each pair is positive: (Q,) captions and (N,) images -> (Q, N)."""
        positive: NDArray[np.bool_] = self._images[captions][:, None] == images[None, :]
        for row in np.flatnonzero(self._is_shared[captions]):
            positive[row] = np.isin(images, self._images_of_key[int(self._keys[captions[row]])])
        return positive


def sample_hardest(
    similarity: NDArray[np.float32],
    positive: NDArray[np.bool_],
    *,
    per_sample: int,
    top_k: int,
    rng: np.random.Generator,
) -> Ints:
    """For each row `per_sample` columns, drawn from the `top_k` most similar negatives: (Q, N) -> (Q, per_sample).

    With `top_k` equal to `per_sample` they are the hardest negatives, as in the paper. A similarity of -inf marks a
    pair that cannot be compared. Columns repeat where a row has too few negatives; a row without negatives holds
    `MISSING`.
    """
    if top_k < per_sample:
        raise ValueError(f"{per_sample} negatives cannot be drawn from the {top_k} most similar")
    masked = np.where(positive, -np.inf, similarity)
    num_best = min(top_k, masked.shape[1])
    best = np.argpartition(-masked, num_best - 1, axis=1)[:, :num_best]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(masked, best, 1), axis=1, kind="stable"), 1)
    num_found = np.isfinite(np.take_along_axis(masked, best, 1)).sum(axis=1)
    chosen = np.full((len(masked), per_sample), MISSING, np.int64)
    for row, found in enumerate(num_found):
        if found:
            columns = rng.permutation(found)[:per_sample]
            chosen[row] = best[row, np.resize(columns, per_sample)]
    return chosen


def sample_columns(lists: Ints, per_sample: int, rng: np.random.Generator) -> Ints:
    """For each row `per_sample` of its entries in random order: (Q, M) -> (Q, per_sample).

    `MISSING` entries are taken last. Entries repeat where a row has fewer than `per_sample`.
    """
    shuffled = rng.permuted(lists, axis=1)
    shuffled = np.take_along_axis(shuffled, np.argsort(shuffled == MISSING, axis=1, kind="stable"), axis=1)
    num_found = np.maximum(1, (shuffled != MISSING).sum(axis=1))
    columns = np.arange(per_sample)[None, :] % num_found[:, None]
    return np.take_along_axis(shuffled, columns, axis=1)


def batch_negatives(
    similarity: Callable[[Ints, Ints], NDArray[np.float32]], positives: Positives, per_sample: int, top_k: int
) -> NegativeSampler:
    """A sampler of negatives from the batch itself, by the first stage's similarity."""

    def sample(captions: Ints, images: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        compared = similarity(captions, images)
        positive = positives.matrix(captions, images)
        columns = sample_hardest(compared, positive, per_sample=per_sample, top_k=top_k, rng=rng)
        rows = sample_hardest(compared.T, positive.T, per_sample=per_sample, top_k=top_k, rng=rng)
        return (
            np.where(columns == MISSING, MISSING, images[columns]),
            np.where(rows == MISSING, MISSING, captions[rows]),
        )

    return sample


def corpus_negatives(
    images_of_caption: Ints,
    captions_of_image: Ints,
    retrieves: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    per_sample: int,
) -> NegativeSampler:
    """A sampler from the first stage's hard negatives in the corpus: (C, M) images and (N, M) captions.

    `retrieves` are two arrays (C,) from `edje.training.first_stage.search.retrieved_positives`: whether the first stage
    retrieves a caption's image for the caption, and the caption for its image. In a direction in which the positive is
    not retrieved, the sample has no negatives.
    """
    retrieves_image, retrieves_caption = retrieves

    def sample(captions: Ints, images: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        negative_images = sample_columns(images_of_caption[captions], per_sample, rng)
        negative_captions = sample_columns(captions_of_image[images], per_sample, rng)
        negative_images[~retrieves_image[captions]] = MISSING
        negative_captions[~retrieves_caption[captions]] = MISSING
        return negative_images, negative_captions

    return sample

"""Which pairs are shown as negatives: the first stage's own best mistakes, never a true pair.

Pure: similarities and identities in, indices out. A caption's positives are the image it was written for and the images
of every equal caption; an image's positives follow from the same relation, read the other way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Index of a negative that could not be found, because everything else in the pool is true.
NONE = -1


class Truth:
    """Which captions are true of which images, known for a whole corpus.

    Two images of a batch may share a caption that is not in the batch itself, so a batch alone cannot tell.
    """

    def __init__(self, caption_keys: NDArray[np.int64], caption_images: NDArray[np.int64]) -> None:
        """For each caption a key, equal for equal captions, and the image it was written for."""
        self._keys, self._images = caption_keys, caption_images
        pairs = np.unique(np.stack((caption_keys, caption_images), axis=1), axis=0)
        keys, starts, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
        # Few captions are true of several images; only for these more than an image's number must be compared.
        self._images_of_key = {
            int(key): pairs[start : start + count, 1]
            for key, start, count in zip(keys, starts, counts, strict=True)
            if count > 1
        }
        self._is_shared = np.isin(caption_keys, list(self._images_of_key))

    def of(self, captions: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(Q,) captions and (N,) images by their numbers -> (Q, N)."""
        positive: NDArray[np.bool_] = self._images[captions][:, None] == images[None, :]
        for row in np.flatnonzero(self._is_shared[captions]):
            positive[row] = np.isin(images, self._images_of_key[int(self._keys[captions[row]])])
        return positive


def mine(
    similarity: NDArray[np.float32],
    positive: NDArray[np.bool_],
    *,
    per_sample: int,
    top_k: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """For each row, `per_sample` columns drawn from the `top_k` most similar that are not positive: (Q, per_sample).

    With `top_k` equal to `per_sample` they are the hardest ones, as in the paper. A similarity of -inf stands for a
    column that cannot be compared. Columns repeat only when there are fewer than `per_sample` to choose from; where
    there is none at all the row holds `NONE`.
    """
    if top_k < per_sample:
        raise ValueError(f"{per_sample} negatives cannot be drawn from the {top_k} most similar")
    masked = np.where(positive, -np.inf, similarity)
    num_best = min(top_k, masked.shape[1])
    best = np.argpartition(-masked, num_best - 1, axis=1)[:, :num_best]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(masked, best, 1), axis=1, kind="stable"), 1)
    num_found = np.isfinite(np.take_along_axis(masked, best, 1)).sum(axis=1)
    chosen = np.full((len(masked), per_sample), NONE, np.int64)
    for row, found in enumerate(num_found):
        if found:
            places = rng.permutation(found)[:per_sample]
            chosen[row] = best[row, np.resize(places, per_sample)]
    return chosen


def draw(lists: NDArray[np.int64], per_sample: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """For each row `per_sample` of its entries, in random order: (Q, M) -> (Q, per_sample).

    Entries that are `NONE` are taken last: they repeat as columns do in `mine`.
    """
    shuffled = rng.permuted(lists, axis=1)
    shuffled = np.take_along_axis(shuffled, np.argsort(shuffled == NONE, axis=1, kind="stable"), axis=1)
    num_found = np.maximum(1, (shuffled != NONE).sum(axis=1))
    places = np.arange(per_sample)[None, :] % num_found[:, None]
    return np.take_along_axis(shuffled, places, axis=1)

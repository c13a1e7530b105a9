"""Which pairs are shown as negatives: the first stage's own best mistakes, never a true pair.

Pure: similarities and identities in, indices out. A caption's positives are the images it was written for and the images
of every equal caption; an image's positives follow from the same matrix, read the other way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Index of a negative that could not be found, because everything else in the pool is true.
NONE = -1


def true_pairs(
    caption_keys: NDArray[np.int64], caption_images: NDArray[np.int64], images: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(Q,) keys equal for equal captions, (Q,) image of each caption, (N,) images -> (Q, N): True where both match.

    A caption that somebody wrote for two images is true of both.
    """
    same = caption_images[:, None] == images[None, :]
    _, number = np.unique(caption_keys, return_inverse=True)
    by_caption = np.zeros((number.max(initial=-1) + 1, len(images)), dtype=bool)
    np.logical_or.at(by_caption, number, same)
    return by_caption[number]


def mine(
    similarity: NDArray[np.float32],
    positive: NDArray[np.bool_],
    *,
    per_sample: int,
    top_k: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """For each row, `per_sample` columns drawn from the `top_k` most similar that are not positive: (Q, per_sample).

    With `top_k` equal to `per_sample` they are the hardest ones, as in the paper. Columns repeat only when there are
    fewer than `per_sample` to choose from; where there is none at all the row holds `NONE`.
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

"""The first stage's embeddings of a split, and the scores of its pairs.

A pair's score is the product of its two embeddings. A first stage that was fitted in closed form is cross-fitted: each
fold's images and captions are embedded by a model fitted without them, so only pairs of one fold have a score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.training.batches.negatives import Ints

Scores = NDArray[np.float32]
Embeddings = NDArray[np.floating]  # half precision where they are mapped from the disk
#: Values that one product may hold: 64 MB.
MAX_PRODUCT_VALUES = 16_000_000


@dataclass(frozen=True, slots=True)
class FirstStageEmbeddings:
    """Embeddings and folds of captions and images, by their indices. Pairs of different folds have no score."""

    captions: Embeddings  # (C, e)
    images: Embeddings  # (N, e)
    caption_folds: Ints  # (C,), the fold of the caption's image
    image_folds: Ints  # (N,)

    def similarity(self, captions: Ints, images: Ints) -> Scores:
        """The scores of all pairs of captions (Q,) and images (N,): (Q, N), -inf for pairs of different folds."""
        scores: Scores = _single(self.captions[captions]) @ _single(self.images[images]).T
        caption_folds, image_folds = self.caption_folds[captions], self.image_folds[images]
        if (image_folds != image_folds[:1]).any() or (caption_folds != image_folds[:1]).any():
            scores[caption_folds[:, None] != image_folds[None, :]] = -np.inf
        return scores

    def pair_scores(self, captions: Ints, images: Ints) -> Scores:
        """The scores of pairs within folds: captions (P,) and images (P,) -> (P,)."""
        scores = np.empty(len(captions), np.float32)
        step = max(1, MAX_PRODUCT_VALUES // self.captions.shape[1])
        for start in range(0, len(captions), step):
            part = slice(start, start + step)
            one, other = _single(self.captions[captions[part]]), _single(self.images[images[part]])
            scores[part] = np.einsum("pe,pe->p", one, other)
        return scores


def _single(embeddings: Embeddings) -> Scores:
    return np.asarray(embeddings, np.float32)

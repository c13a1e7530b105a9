"""What the first stage says of a split: embeddings of its captions and images, cross-fitted where it must be.

A pair's score is the product of its two embeddings. For a first stage fitted in closed form, each image of a training
split and its captions are embedded by a model that was fitted without them; only pairs of one fold then have a score,
and negatives stay within it. A fold of a fifth is also about as large as what is searched at test time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edje.cca import CcaSettings, fit_cca
from edje.first_stage import FirstStageModel
from edje.recipe import FirstStageRecipe
from edje.training.corpus import Captions
from edje.training.negatives import NONE, true_pairs

Ints = NDArray[np.int64]
Matrix = NDArray[np.float32]
#: Captions embedded or compared at a time.
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class FirstStageViews:
    """Embeddings by caption and by image number, and the fold of each image."""

    texts: Matrix  # (C, e)
    images: Matrix  # (N, e)
    folds: Ints  # (N,), all zero where nothing was cross-fitted

    def similarity(self, captions: Ints, images: Ints) -> Matrix:
        """Everything with everything: (Q,), (N,) -> (Q, N)."""
        return self.texts[captions] @ self.images[images].T

    def of_pairs(self, captions: Ints, images: Ints) -> Matrix:
        """(P,), (P,) -> (P,)"""
        scores: Matrix = np.einsum("pe,pe->p", self.texts[captions], self.images[images])
        return scores


@torch.inference_mode()
def embed(model: FirstStageModel, captions: Captions, pooled: NDArray[np.floating]) -> tuple[Matrix, Matrix]:
    """Every caption (C, e) and every image (N, e)."""
    device = model.image_out.weight.device
    texts = []
    for start in range(0, len(captions), _CHUNK):
        ids, lengths = captions.padded(np.arange(start, min(start + _CHUNK, len(captions))))
        texts.append(model.embed_texts(ids.to(device), lengths.to(device)).cpu().numpy())
    images = model.embed_images(torch.from_numpy(np.asarray(pooled, np.float32)).to(device)).cpu().numpy()
    return np.concatenate(texts), images


def cross_fit(
    recipe: FirstStageRecipe, captions: Captions, pooled: NDArray[np.floating], vocab_size: int, seed: int
) -> tuple[FirstStageModel, FirstStageViews]:
    """The first stage fitted on everything, for use, and what models that left a fold out say of that fold."""
    settings = CcaSettings(recipe.dim, recipe.ridge, recipe.correlation_power, recipe.image_power)
    images = np.asarray(pooled, np.float32)
    words = captions.words()
    used = np.unique(captions.images)
    folds = np.zeros(len(images), np.int64)
    folds[used] = np.random.default_rng(seed).permutation(len(used)) % recipe.folds

    def fit(is_fitted: NDArray[np.bool_]) -> FirstStageModel:
        rows = np.flatnonzero(is_fitted[captions.images])
        numbers, image_of_text = np.unique(captions.images[rows], return_inverse=True)
        return fit_cca(images[numbers], [words[row] for row in rows], image_of_text, vocab_size, settings)

    texts = np.zeros((len(captions), settings.dim), np.float32)
    embedded = np.zeros((len(images), settings.dim), np.float32)
    for fold in range(recipe.folds):
        model = fit(folds != fold)
        fold_texts, fold_images = embed(model, captions, images)
        texts[folds[captions.images] == fold] = fold_texts[folds[captions.images] == fold]
        embedded[folds == fold] = fold_images[folds == fold]
    return fit(np.ones(len(images), bool)), FirstStageViews(texts, embedded, folds)


def best_mistakes(views: FirstStageViews, captions: Captions, num_kept: int) -> tuple[Ints, Ints]:
    """For each caption the images (C, M), for each image the captions (N, M), that the first stage ranks highest and
    that are not true of it. `NONE` where there are fewer."""
    best_images = np.full((len(captions), num_kept), NONE, np.int64)
    best_captions = np.full((len(views.folds), num_kept), NONE, np.int64)
    for fold in np.unique(views.folds[captions.images]):
        rows = np.flatnonzero(views.folds[captions.images] == fold)
        images = np.unique(captions.images[rows])
        positive = true_pairs(captions.keys[rows], captions.images[rows], images)
        compared = views.similarity(rows, images)
        compared[positive] = -np.inf
        best_images[rows] = _best(compared, images, num_kept)
        best_captions[images] = _best(compared.T, rows, num_kept)
    return best_images, best_captions


def _best(compared: Matrix, names: Ints, num_kept: int) -> Ints:
    num = min(num_kept, compared.shape[1])
    columns = np.argpartition(-compared, num - 1, axis=1)[:, :num]
    found = np.where(np.isfinite(np.take_along_axis(compared, columns, 1)), names[columns], NONE)
    padded: Ints = np.pad(found, ((0, 0), (0, num_kept - num)), constant_values=NONE)
    return padded

"""What the first stage says of a split: embeddings of its captions and images, cross-fitted where it must be.

A pair's score is the product of its two embeddings. For a first stage fitted in closed form, each image of a training
split and its captions are embedded by a model that was fitted without them; only pairs of one fold then have a score,
and negatives stay within it. A fold of a fifth is also about as large as what is searched at test time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edje.first_stage.cca import CcaSettings, fit_cca
from edje.first_stage.dual_encoder import FirstStage, FirstStageModel
from edje.recipe import FirstStageRecipe, RecipeError
from edje.training.corpus import Captions
from edje.training.negatives import NONE, Truth

Ints = NDArray[np.int64]
Matrix = NDArray[np.float32]
Vectors = NDArray[np.floating]  # half precision where they lie on the disk
#: Similarities held at a time: 64 MB.
_COMPARED = 16_000_000


@dataclass(frozen=True, slots=True)
class FirstStageViews:
    """Embeddings by caption and by image number, and the fold of each."""

    texts: Vectors  # (C, e)
    images: Vectors  # (N, e)
    text_folds: Ints  # (C,), that of the caption's image; all zero where nothing was cross-fitted
    image_folds: Ints  # (N,)

    @classmethod
    def of_one_model(cls, texts: Vectors, images: Vectors, caption_images: Ints, pools: Ints) -> FirstStageViews:
        """Nothing was cross-fitted; what is compared are the images of one pool (N,), see `search_pools`."""
        return cls(texts, images, pools[caption_images], pools)

    def similarity(self, captions: Ints, images: Ints) -> Matrix:
        """Everything with everything: (Q,), (N,) -> (Q, N); -inf for what two models embedded."""
        compared: Matrix = _single(self.texts[captions]) @ _single(self.images[images]).T
        text_folds, image_folds = self.text_folds[captions], self.image_folds[images]
        if (image_folds != image_folds[:1]).any() or (text_folds != image_folds[:1]).any():
            compared[text_folds[:, None] != image_folds[None, :]] = -np.inf
        return compared

    def of_pairs(self, captions: Ints, images: Ints) -> Matrix:
        """(P,), (P,) of one fold each -> (P,)"""
        scores = np.empty(len(captions), np.float32)
        step = max(1, _COMPARED // self.texts.shape[1])
        for start in range(0, len(captions), step):
            part = slice(start, start + step)
            texts, seen = _single(self.texts[captions[part]]), _single(self.images[images[part]])
            scores[part] = np.einsum("pe,pe->p", texts, seen)
        return scores


def _single(vectors: Vectors) -> Matrix:
    return np.asarray(vectors, np.float32)


def search_pools(groups: Sequence[str | None], pool_images: int | None, seed: int) -> Ints:
    """(N,) numbers that cut the images into random pools of about `pool_images`, groups kept whole; None: one pool.

    The first stage's best mistakes among a thousand images are those that it makes when it searches a thousand.
    """
    names = [f"{number}" if group is None else f"group {group}" for number, group in enumerate(groups)]
    _, members = np.unique(names, return_inverse=True)
    num_groups = members.max(initial=-1) + 1
    num_pools = 1 if pool_images is None else max(1, round(len(names) / pool_images))
    pools: Ints = (np.random.default_rng(seed).permutation(num_groups) % num_pools)[members]
    return pools


def embed(model: FirstStage, captions: Captions, pooled: NDArray[np.floating]) -> tuple[Matrix, Matrix]:
    """Every caption (C, e) and every image (N, e)."""
    return model.caption_vectors(captions.texts, captions.id_lists()), model.image_vectors(pooled)


def cross_fit(
    recipe: FirstStageRecipe, captions: Captions, pooled: NDArray[np.floating], vocab_size: int, seed: int
) -> tuple[FirstStageModel, FirstStageViews]:
    """The first stage fitted on everything, for use, and what models that left a fold out say of that fold.

    Raises `RecipeError` where there is too little to be fitted on.
    """
    settings = CcaSettings(recipe.dim, recipe.ridge, recipe.correlation_power, recipe.image_power)
    images = np.asarray(pooled, np.float32)
    words = captions.words()
    used = np.unique(captions.images)
    folds = np.zeros(len(images), np.int64)
    folds[used] = np.random.default_rng(seed).permutation(len(used)) % recipe.folds
    text_folds = folds[captions.images]

    def fit(is_fitted: NDArray[np.bool_]) -> FirstStageModel:
        rows = np.flatnonzero(is_fitted[captions.images])
        numbers, image_of_text = np.unique(captions.images[rows], return_inverse=True)
        try:
            model = fit_cca(images[numbers], [words[row] for row in rows], image_of_text, vocab_size, settings)
            has_words = bool(model.word_weights.any())
        except (ValueError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # it is there
            has_words = False
        if not has_words:
            raise RecipeError(
                f"no first stage can be fitted on {len(rows)} captions of {len(numbers)} images: no word is frequent "
                "enough, or the images look all the same; bring more data"
            )
        return model

    texts = np.zeros((len(captions), settings.dim), np.float32)
    embedded = np.zeros((len(images), settings.dim), np.float32)
    for fold in range(recipe.folds):
        fold_texts, fold_images = embed(fit(folds != fold), captions, images)
        texts[text_folds == fold] = fold_texts[text_folds == fold]
        embedded[folds == fold] = fold_images[folds == fold]
    return fit(np.ones(len(images), bool)), FirstStageViews(texts, embedded, text_folds, folds)


def best_mistakes(views: FirstStageViews, captions: Captions, truth: Truth, num_kept: int) -> tuple[Ints, Ints]:
    """For each caption the images (C, M), for each image the captions (N, M), that the first stage ranks highest and
    that are not true of it, the worst mistake first. `NONE` where there are fewer."""
    best_images = mistaken_images(views, captions, truth, np.arange(len(captions)), num_kept)
    best_captions = np.full((len(views.image_folds), num_kept), NONE, np.int64)
    for rows, images in _by_fold(views, captions):

        def compared(some: Ints, rows: Ints = rows) -> Matrix:
            similarity = views.similarity(rows, some)
            similarity[truth.of(rows, some)] = -np.inf
            return similarity.T

        best_captions[images] = _best(compared, images, rows, num_kept)
    return best_images, best_captions


def handed_over(
    views: FirstStageViews, captions: Captions, best_images: Ints, best_captions: Ints
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each caption (C,) whether the first stage hands over its image among its best mistakes, and whether it hands
    over the caption among those of its image; both from `best_mistakes`.

    What it does not hand over is never ranked. Shown beside its mistakes all the same, a right image would be the one
    with the lowest score among them, and a model that reads the score learns to turn the first stage's order round.
    """
    rows = np.arange(len(captions))
    own = views.of_pairs(rows, captions.images)
    worst_image, worst_caption = best_images[:, -1], best_captions[captions.images, -1]
    # With fewer mistakes than are kept, everything is handed over.
    by_caption, by_image = worst_image == NONE, worst_caption == NONE
    by_caption[~by_caption] = own[~by_caption] > views.of_pairs(rows[~by_caption], worst_image[~by_caption])
    others, at = worst_caption[~by_image], captions.images[~by_image]
    by_image[~by_image] = own[~by_image] > views.of_pairs(others, at)
    return by_caption, by_image


def mistaken_images(views: FirstStageViews, captions: Captions, truth: Truth, wanted: Ints, num_kept: int) -> Ints:
    """The first half of `best_mistakes`, for some captions: (Q,) in ascending order -> (Q, M)."""
    best = np.full((len(wanted), num_kept), NONE, np.int64)
    for rows, images in _by_fold(views, captions):

        def compared(some: Ints, images: Ints = images) -> Matrix:
            similarity = views.similarity(some, images)
            similarity[truth.of(some, images)] = -np.inf
            return similarity

        asked = np.intersect1d(rows, wanted, assume_unique=True)
        best[np.searchsorted(wanted, asked)] = _best(compared, asked, images, num_kept)
    return best


def score_spread(views: FirstStageViews, captions: Captions, rows: Ints, best_images: Ints) -> tuple[float, float]:
    """Mean and deviation of the scores of what the first stage hands over: for these captions (Q,) their own images and
    its best mistakes (Q, M)."""
    exists = best_images != NONE
    mistakes = views.of_pairs(np.repeat(rows, exists.sum(axis=1)), best_images[exists])
    scores = np.concatenate((mistakes, views.of_pairs(rows, captions.images[rows])))
    return float(scores.mean()), max(float(scores.std()), 1e-6)


def _by_fold(views: FirstStageViews, captions: Captions) -> list[tuple[Ints, Ints]]:
    """Captions and images of each fold, by their numbers, in ascending order."""
    folds = [np.flatnonzero(views.text_folds == fold) for fold in np.unique(views.text_folds)]
    return [(rows, np.unique(captions.images[rows])) for rows in folds]


def _best(compare: Callable[[Ints], Matrix], rows: Ints, names: Ints, num_kept: int) -> Ints:
    """For each row the names of the columns with the highest finite values, in order; `compare` gives some rows."""
    num = min(num_kept, len(names))
    best = np.full((len(rows), num_kept), NONE, np.int64)
    step = max(1, _COMPARED // len(names))
    for start in range(0, len(rows), step):
        compared = torch.from_numpy(compare(rows[start : start + step]))
        values, columns = compared.topk(num, dim=1)  # several times as fast as numpy's partition
        best[start : start + step, :num] = np.where(values.isfinite().numpy(), names[columns.numpy()], NONE)
    return best

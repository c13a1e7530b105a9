"""Searches a split by the first stage's embeddings: hard negatives and retrieved positives.

Also embeds the split, with cross-fitting where the first stage is fitted in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edje.first_stage.base import FirstStageEncoder
from edje.first_stage.cca import CcaSettings, fit_cca
from edje.first_stage.dual_encoder import DualEncoder
from edje.recipe import FirstStageRecipe, RecipeError
from edje.training.batches.corpus import Captions
from edje.training.batches.embeddings import MAX_PRODUCT_VALUES, FirstStageEmbeddings, Scores
from edje.training.batches.negatives import MISSING, Ints, Positives


def search_pools(groups: Sequence[str | None], pool_images: int | None, seed: int) -> Ints:
    """Divide the images at random into pools of about `pool_images`: (N,) pool numbers. None: one pool.

    Images of one group are in one pool. The hard negatives within a pool are as hard as in a search of `pool_images`
    images.
    """
    names = [f"{number}" if group is None else f"group {group}" for number, group in enumerate(groups)]
    _, members = np.unique(names, return_inverse=True)
    num_groups = members.max(initial=-1) + 1
    num_pools = 1 if pool_images is None else max(1, round(len(names) / pool_images))
    pools: Ints = (np.random.default_rng(seed).permutation(num_groups) % num_pools)[members]
    return pools


def embed(model: FirstStageEncoder, captions: Captions, pooled: NDArray[np.floating]) -> tuple[Scores, Scores]:
    """The embeddings of every caption (C, e) and every image (N, e)."""
    return model.caption_vectors(captions.texts, captions.id_lists()), model.image_vectors(pooled)


def cross_fit(
    recipe: FirstStageRecipe, captions: Captions, pooled: NDArray[np.floating], vocab_size: int, seed: int
) -> tuple[DualEncoder, FirstStageEmbeddings]:
    """The first stage fitted on all data, and embeddings of each fold by a model fitted on the other folds.

    A fold of a fifth has about as many images as a search at test time. Raises `RecipeError` for too little data.
    """
    settings = CcaSettings(recipe.dim, recipe.ridge, recipe.correlation_power, recipe.image_power)
    images = np.asarray(pooled, np.float32)
    words = captions.word_ids()
    used = np.unique(captions.images)
    folds = np.zeros(len(images), np.int64)
    folds[used] = np.random.default_rng(seed).permutation(len(used)) % recipe.folds
    caption_folds = folds[captions.images]

    def fit(is_fitted: NDArray[np.bool_]) -> DualEncoder:
        rows = np.flatnonzero(is_fitted[captions.images])
        indices, image_of_caption = np.unique(captions.images[rows], return_inverse=True)
        try:
            model = fit_cca(images[indices], [words[row] for row in rows], image_of_caption, vocab_size, settings)
            has_words = bool(model.word_weights.any())
        except (ValueError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # it is there
            has_words = False
        if not has_words:
            raise RecipeError(
                f"no first stage can be fitted on {len(rows)} captions of {len(indices)} images: no word is frequent "
                "enough, or all images have the same features. Add images and captions"
            )
        return model

    caption_embeddings = np.zeros((len(captions), settings.dim), np.float32)
    image_embeddings = np.zeros((len(images), settings.dim), np.float32)
    for fold in range(recipe.folds):
        fold_captions, fold_images = embed(fit(folds != fold), captions, images)
        caption_embeddings[caption_folds == fold] = fold_captions[caption_folds == fold]
        image_embeddings[folds == fold] = fold_images[folds == fold]
    embeddings = FirstStageEmbeddings(caption_embeddings, image_embeddings, caption_folds, folds)
    return fit(np.ones(len(images), bool)), embeddings


def hard_negatives(
    embeddings: FirstStageEmbeddings, captions: Captions, positives: Positives, num_kept: int
) -> tuple[Ints, Ints]:
    """The negatives with the highest scores: images of each caption (C, M), captions of each image (N, M).

    Best score first; `MISSING` where there are fewer.
    """
    best_images = hard_negative_images(embeddings, captions, positives, np.arange(len(captions)), num_kept)
    best_captions = np.full((len(embeddings.image_folds), num_kept), MISSING, np.int64)
    for rows, images in _by_fold(embeddings, captions):

        def negatives_of(some: Ints, rows: Ints = rows) -> Scores:
            scores = embeddings.similarity(rows, some)
            scores[positives.matrix(rows, some)] = -np.inf
            return scores.T

        best_captions[images] = _best(negatives_of, images, rows, num_kept)
    return best_images, best_captions


def hard_negative_images(
    embeddings: FirstStageEmbeddings, captions: Captions, positives: Positives, wanted: Ints, num_kept: int
) -> Ints:
    """The images of `hard_negatives` for some captions: (Q,) in ascending order -> (Q, M)."""
    best = np.full((len(wanted), num_kept), MISSING, np.int64)
    for rows, images in _by_fold(embeddings, captions):

        def negatives_of(some: Ints, images: Ints = images) -> Scores:
            scores = embeddings.similarity(some, images)
            scores[positives.matrix(some, images)] = -np.inf
            return scores

        searched = np.intersect1d(rows, wanted, assume_unique=True)
        best[np.searchsorted(wanted, searched)] = _best(negatives_of, searched, images, num_kept)
    return best


def retrieved_positives(
    embeddings: FirstStageEmbeddings, captions: Captions, best_images: Ints, best_captions: Ints
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return whether the first stage retrieves each caption's image, and each caption for its image: (C,) and (C,).

    An item is retrieved if fewer than M negatives score higher; `best_images` (C, M) and `best_captions` (N, M) are
    from `hard_negatives`. A positive that is not retrieved is never reranked. As a training pair, it would have the
    lowest score among its negatives, and a model that reads scores would learn to reverse them.
    """
    rows = np.arange(len(captions))
    own = embeddings.pair_scores(rows, captions.images)
    worst_image, worst_caption = best_images[:, -1], best_captions[captions.images, -1]
    # With fewer than M negatives, every positive is retrieved.
    retrieves_image, retrieves_caption = worst_image == MISSING, worst_caption == MISSING
    unknown = ~retrieves_image
    retrieves_image[unknown] = own[unknown] > embeddings.pair_scores(rows[unknown], worst_image[unknown])
    unknown = ~retrieves_caption
    worst_scores = embeddings.pair_scores(worst_caption[unknown], captions.images[unknown])
    retrieves_caption[unknown] = own[unknown] > worst_scores
    return retrieves_image, retrieves_caption


def _by_fold(embeddings: FirstStageEmbeddings, captions: Captions) -> list[tuple[Ints, Ints]]:
    """Indices of the captions and images of each fold, in ascending order."""
    folds = [np.flatnonzero(embeddings.caption_folds == fold) for fold in np.unique(embeddings.caption_folds)]
    return [(rows, np.unique(captions.images[rows])) for rows in folds]


def _best(score: Callable[[Ints], Scores], rows: Ints, indices: Ints, num_kept: int) -> Ints:
    """For each row the indices of the columns with the highest finite scores, in order.

    `score` returns the scores of some rows; `indices` are the columns' indices.
    """
    num = min(num_kept, len(indices))
    best = np.full((len(rows), num_kept), MISSING, np.int64)
    step = max(1, MAX_PRODUCT_VALUES // len(indices))
    for start in range(0, len(rows), step):
        scores = torch.from_numpy(score(rows[start : start + step]))
        values, columns = scores.topk(num, dim=1)  # several times as fast as numpy's partition
        best[start : start + step, :num] = np.where(values.isfinite().numpy(), indices[columns.numpy()], MISSING)
    return best

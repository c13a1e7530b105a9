"""The first stage's part in training: what it says of the training pairs, and which of them become negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edje.config import EdjeConfig
from edje.first_stage.dual_encoder import FirstStage, FirstStageModel, FirstStageModelConfig, draw_first_stage
from edje.imports.sources import HUB_PREFIX
from edje.recipe import Negatives, Phase, Recipe, RecipeError
from edje.training.batches.sampling import Miner, batch_miner, corpus_miner
from edje.training.corpus import Captions
from edje.training.first_stage.pairs import (
    FirstStageViews,
    best_mistakes,
    cross_fit,
    embed,
    handed_over,
    mistaken_images,
    score_spread,
    search_pools,
)
from edje.training.first_stage.vector_cache import Half
from edje.training.negatives import Truth

#: Captions from which the spread of scores is taken, where nothing else needs their candidates: it is searched for
#: them in the whole corpus.
_STATISTICS_CAPTIONS = 5000


def new_first_stage(recipe: Recipe, config: EdjeConfig, device: torch.device) -> FirstStage:
    """The recipe's first stage: one that was published, or one to be trained (`dual`) or fitted (`cca`) later."""
    wanted = recipe.first_stage
    if wanted.kind == "hub":
        from edje.first_stage.hub import published_first_stage

        source = wanted.source or recipe.tower
        assert source is not None  # the recipe was checked
        published = published_first_stage(source.removeprefix(HUB_PREFIX)).to(device)
        if published.config.image_dim != config.vision.pooled_dim:
            raise RecipeError(
                f"first_stage: {source} compares images of {published.config.image_dim} features, the tower gives "
                f"{config.vision.pooled_dim}: a published first stage needs the tower that it belongs to"
            )
        return published
    is_trained = wanted.kind == "dual"
    model = FirstStageModel(
        FirstStageModelConfig(
            dim=wanted.dim,
            vocab_size=config.joint.vocab_size,
            image_dim=config.vision.pooled_dim,
            text_dim=wanted.text_dim if is_trained else wanted.dim,
            num_layers=wanted.num_layers if is_trained else 0,
            num_heads=wanted.num_heads if is_trained else 1,
            max_positions=config.preprocess.max_text_tokens,
            image_power=1.0 if is_trained else wanted.image_power,
        )
    )
    draw_first_stage(model, recipe.seed)
    return model.to(device)


def views_for(
    recipe: Recipe,
    phase: Phase,
    first_stage: FirstStage,
    captions: Captions,
    pooled: NDArray[np.floating],
    groups: Sequence[str | None],
    known: FirstStageViews | None,
    kept: Callable[[], tuple[Half, Half]] | None = None,
) -> FirstStageViews | None:
    """What the first stage says of the training split in a phase; None while it is being trained.

    A CCA is fitted here, once (`known` is what came of it), and put into `first_stage`. `groups` are the images' own.
    `kept` gives the vectors of captions and images where they lie on the disk.
    """
    if recipe.first_stage.kind == "cca":
        if known is not None:
            return known
        assert isinstance(first_stage, FirstStageModel)  # as `new_first_stage` makes it
        fitted, views = cross_fit(recipe.first_stage, captions, pooled, first_stage.config.vocab_size, recipe.seed)
        first_stage.load_state_dict(fitted.state_dict())
        return views
    if "first_stage" in phase.train:
        return None
    # A batch is a pool of its own.
    pool_images = recipe.first_stage.pool_images if phase.negatives.source == "corpus" else None
    pools = search_pools(groups, pool_images, recipe.seed)
    texts, images = embed(first_stage, captions, pooled) if kept is None else kept()
    return FirstStageViews.of_one_model(texts, images, captions.images, pools)


def miner_for(
    wanted: Negatives, views: FirstStageViews, captions: Captions, truth: Truth, num_candidates: int
) -> tuple[Miner, Callable[[], tuple[float, float]]]:
    """What draws a step's negatives; and a way to the mean and deviation of the scores of what is handed over,
    `num_candidates` or more for each caption. Raises `RecipeError` where nothing right is handed over."""
    top_k = wanted.top_k or wanted.per_sample
    if wanted.source == "corpus":
        best_images, best_captions = best_mistakes(views, captions, truth, top_k)
        finds = handed_over(views, captions, best_images, best_captions)
        rows = np.flatnonzero(finds[0])
        if not len(rows):
            raise RecipeError(
                f"negatives: the first stage finds no caption's image among its {top_k} best mistakes, so there is "
                "nothing to rank: raise `top_k`"
            )
        return (
            corpus_miner(best_images, best_captions, finds, wanted.per_sample),
            lambda: score_spread(views, captions, rows, best_images[rows]),
        )

    def spread() -> tuple[float, float]:
        rows = np.unique(np.linspace(0, len(captions) - 1, _STATISTICS_CAPTIONS).astype(np.int64))
        kept = mistaken_images(views, captions, truth, rows, max(top_k, num_candidates))
        return score_spread(views, captions, rows, kept)

    return batch_miner(views.similarity, truth, wanted.per_sample, top_k), spread

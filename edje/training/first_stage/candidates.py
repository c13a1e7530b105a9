"""Creates the recipe's first stage, embeds the training split by it, and chooses the negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edje.config import EdjeConfig
from edje.first_stage.base import FirstStageEncoder
from edje.first_stage.dual_encoder import DualEncoder, DualEncoderConfig
from edje.imports.sources import HUB_PREFIX
from edje.model.initialisation import initialise
from edje.recipe import Negatives, Phase, Recipe, RecipeError
from edje.training.batches.corpus import Captions
from edje.training.batches.embeddings import FirstStageEmbeddings
from edje.training.batches.negatives import NegativeSampler, Positives, batch_negatives, corpus_negatives
from edje.training.first_stage.search import (
    cross_fit,
    embed,
    hard_negatives,
    retrieved_positives,
    search_pools,
)
from edje.training.first_stage.vector_cache import Half


def create_first_stage(recipe: Recipe, config: EdjeConfig, device: torch.device) -> FirstStageEncoder:
    """The recipe's first stage: published (`hub`), or initialised, to be trained (`dual`) or fitted (`cca`) later."""
    wanted = recipe.first_stage
    if wanted.kind == "hub":
        from edje.first_stage.hub import load_published_first_stage

        source = wanted.source or recipe.tower
        assert source is not None  # the recipe ensures it
        published = load_published_first_stage(source.removeprefix(HUB_PREFIX)).to(device)
        if published.config.image_dim != config.vision.pooled_dim:
            raise RecipeError(
                f"first_stage: {source} reads image embeddings of {published.config.image_dim} values, the tower "
                f"computes {config.vision.pooled_dim}: name the first stage that was published with the tower"
            )
        return published
    is_trained = wanted.kind == "dual"
    model = DualEncoder(
        DualEncoderConfig(
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
    initialise(model, recipe.seed)
    return model.to(device)


def embed_split(
    recipe: Recipe,
    phase: Phase,
    first_stage: FirstStageEncoder,
    captions: Captions,
    pooled: NDArray[np.floating],
    groups: Sequence[str | None],
    earlier: FirstStageEmbeddings | None,
    cached: Callable[[], tuple[Half, Half]] | None = None,
) -> FirstStageEmbeddings | None:
    """The first stage's embeddings of the training split in a phase; None while the first stage is trained.

    A CCA is fitted once, in the first phase, and its weights are loaded into `first_stage`; `earlier` are its
    embeddings in later phases. `groups` are the groups of the images. `cached` returns embeddings from the disk.
    """
    if recipe.first_stage.kind == "cca":
        if earlier is not None:
            return earlier
        assert isinstance(first_stage, DualEncoder)  # as `create_first_stage` makes it
        fitted, embeddings = cross_fit(recipe.first_stage, captions, pooled, first_stage.config.vocab_size, recipe.seed)
        first_stage.load_state_dict(fitted.state_dict())
        return embeddings
    if "first_stage" in phase.train:
        return None
    # With negatives from the batch, the batch is the pool.
    pool_images = recipe.first_stage.pool_images if phase.negatives.source == "corpus" else None
    pools = search_pools(groups, pool_images, recipe.seed)
    caption_embeddings, image_embeddings = embed(first_stage, captions, pooled) if cached is None else cached()
    return FirstStageEmbeddings(caption_embeddings, image_embeddings, pools[captions.images], pools)


def negative_sampler(
    wanted: Negatives, embeddings: FirstStageEmbeddings, captions: Captions, positives: Positives
) -> NegativeSampler:
    """The sampler of negatives. Raises `RecipeError` if the first stage retrieves no caption's image."""
    top_k = wanted.top_k or wanted.per_sample
    if wanted.source == "batch":
        return batch_negatives(embeddings.similarity, positives, wanted.per_sample, top_k)
    best_images, best_captions = hard_negatives(embeddings, captions, positives, top_k)
    retrieves = retrieved_positives(embeddings, captions, best_images, best_captions)
    if not retrieves[0].any():
        raise RecipeError(
            f"negatives: no training caption's image is among its first stage's top {top_k} candidates, so there "
            "is nothing to rerank. Raise negatives.top_k in the recipe, or train the first stage longer"
        )
    return corpus_negatives(best_images, best_captions, retrieves, wanted.per_sample)

"""Hard negatives are never positive, have the highest scores, and are scored by models fitted without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.recipe import FirstStageRecipe, Negatives, RecipeError
from edje.training.batches.corpus import Captions
from edje.training.batches.embeddings import FirstStageEmbeddings
from edje.training.batches.negatives import (
    MISSING,
    Positives,
    batch_negatives,
    corpus_negatives,
    sample_columns,
    sample_hardest,
)
from edje.training.first_stage import search as search_module
from edje.training.first_stage.candidates import negative_sampler
from edje.training.first_stage.search import (
    cross_fit,
    hard_negative_images,
    hard_negatives,
    retrieved_positives,
    search_pools,
)

seeds = st.integers(0, 2**32 - 1)


@st.composite
def corpora(draw):
    """Captions of a few images, some with equal text, and first-stage embeddings of them."""
    num_images = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(seeds))
    images = np.sort(np.concatenate((np.arange(num_images), rng.integers(0, num_images, draw(st.integers(0, 12))))))
    keys = rng.integers(0, draw(st.integers(1, 20)), len(images))
    return captions_of(images, keys), embeddings_of(images, num_images, rng, num_folds=draw(st.integers(1, 3)))


def captions_of(images, keys):
    ids = np.tile(np.array([[2, 9, 3]], np.int32), (len(images), 1))
    return Captions(tuple("x" * len(images)), ids, np.full(len(images), 3), images, keys)


def embeddings_of(images, num_images, rng, num_folds=1):
    folds = np.arange(num_images) % num_folds
    vectors = [rng.normal(size=(number, 4)).astype(np.float32) for number in (len(images), num_images)]
    return FirstStageEmbeddings(*vectors, folds[images], folds)


def is_positive(captions, caption, image):
    """Whether the image has a caption with the same text."""
    return any(captions.keys[other] == captions.keys[caption] for other in np.flatnonzero(captions.images == image))


def positives_of(captions):
    return Positives(captions.keys, captions.images)


@settings(max_examples=40, deadline=None)
@given(corpus=corpora())
def test_a_caption_is_positive_for_its_image_and_for_images_with_an_equal_caption(corpus):
    captions, embeddings = corpus
    rows, columns = np.arange(len(captions)), np.arange(len(embeddings.images))

    found = positives_of(captions).matrix(rows, columns)

    assert found.tolist() == [[is_positive(captions, row, column) for column in columns] for row in rows]


def test_an_equal_caption_outside_the_batch_counts():
    # Caption 0 of image 0 equals caption 2 of image 1; the batch contains caption 1 of image 1.
    captions = captions_of(np.array([0, 1, 1]), np.array([7, 8, 7]))

    assert positives_of(captions).matrix(np.array([0, 1]), np.array([0, 1])).tolist() == [[True, True], [False, True]]


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), per_sample=st.integers(1, 3), more=st.integers(0, 4), seed=seeds, from_corpus=st.booleans())
def test_no_sampled_negative_is_positive(corpus, per_sample, more, seed, from_corpus):
    captions, embeddings = corpus
    positives, rng = positives_of(captions), np.random.default_rng(seed)
    if from_corpus:
        listed = hard_negatives(embeddings, captions, positives, per_sample + more)
        retrieves = retrieved_positives(embeddings, captions, *listed)
        miner = corpus_negatives(*listed, retrieves, per_sample)
    else:
        miner = batch_negatives(embeddings.similarity, positives, per_sample, per_sample + more)
    batch = rng.permutation(len(captions))[: rng.integers(1, len(captions) + 1)]

    images_for, captions_for = miner(batch, captions.images[batch], rng)

    assert images_for.shape == captions_for.shape == (len(batch), per_sample)
    in_reach = np.arange(len(captions)) if from_corpus else batch
    for row, caption in enumerate(batch):
        image = captions.images[caption]
        wrong_images = {
            int(captions.images[other])
            for other in in_reach
            if embeddings.caption_folds[other] == embeddings.caption_folds[caption]
            and not is_positive(captions, caption, captions.images[other])
        }
        wrong_captions = {
            int(other)
            for other in in_reach
            if embeddings.caption_folds[other] == embeddings.caption_folds[caption]
            and not is_positive(captions, other, image)
        }
        both = ((images_for[row], wrong_images), (captions_for[row], wrong_captions))
        for way, (found, wrong) in enumerate(both):
            if wrong and (not from_corpus or retrieves[way][caption]):
                assert set(found.tolist()) <= wrong
                # A batch may contain an image twice, and then sample it twice.
                assert not from_corpus or len(set(found.tolist())) == min(per_sample, len(wrong))
            else:
                assert set(found.tolist()) == {MISSING}


@settings(max_examples=30, deadline=None)
@given(corpus=corpora(), num_wanted=st.integers(1, 4))
def test_the_hardest_negatives_are_sampled_where_top_k_equals_their_number(corpus, num_wanted):
    captions, embeddings = corpus
    positives = positives_of(captions)
    rows, columns = np.arange(len(captions)), np.arange(len(embeddings.images))
    similarity, positive = embeddings.similarity(rows, columns), positives.matrix(rows, columns)

    mined = sample_hardest(similarity, positive, per_sample=num_wanted, top_k=num_wanted, rng=np.random.default_rng(0))
    listed, listed_captions = hard_negatives(embeddings, captions, positives, num_wanted)

    masked = np.where(positive, -np.inf, similarity)
    for one, other, lines in ((mined, listed, masked), (None, listed_captions, masked.T)):
        for row, line in enumerate(lines):
            best = [int(column) for column in np.argsort(-line)[:num_wanted] if np.isfinite(line[column])]
            assert other[row].tolist() == best + [MISSING] * (num_wanted - len(best))
            assert one is None or set(one[row].tolist()) == set(best or [MISSING])


@settings(max_examples=40, deadline=None)
@given(corpus=corpora(), num_kept=st.integers(1, 4))
def test_a_positive_is_retrieved_if_fewer_than_top_k_negatives_score_higher(corpus, num_kept):
    captions, embeddings = corpus
    positives = positives_of(captions)
    rows, columns = np.arange(len(captions)), np.arange(len(embeddings.images))
    compared = embeddings.similarity(rows, columns)
    wrong = np.where(positives.matrix(rows, columns), -np.inf, compared)
    own = compared[rows, captions.images]

    retrieves_image, retrieves_caption = retrieved_positives(
        embeddings, captions, *hard_negatives(embeddings, captions, positives, num_kept)
    )

    assert retrieves_image.tolist() == ((wrong > own[:, None]).sum(axis=1) < num_kept).tolist()
    above = (wrong[:, captions.images] > own[None, :]).sum(axis=0)  # captions with a higher score
    assert retrieves_caption.tolist() == (above < num_kept).tolist()


def test_a_first_stage_that_retrieves_no_positive_is_refused():
    captions, embeddings = (
        captions_of(np.arange(4), np.arange(4)),
        embeddings_of(np.arange(4), 4, np.random.default_rng(0)),
    )
    embeddings = replace(embeddings, captions=-embeddings.images)  # each caption has the lowest score with its image
    wanted = Negatives(source="corpus", per_sample=1, top_k=1)

    with pytest.raises(
        RecipeError,
        match=r"no training caption's image is among its first stage's top 1 candidates.* Raise negatives\.top_k",
    ):
        negative_sampler(wanted, embeddings, captions, positives_of(captions))


def test_more_negatives_than_top_k_are_refused():
    positive, rng = np.eye(2, 4, dtype=bool), np.random.default_rng(0)

    with pytest.raises(ValueError, match="3 negatives cannot be drawn from the 2"):
        sample_hardest(np.zeros((2, 4), np.float32), positive, per_sample=3, top_k=2, rng=rng)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, num_there=st.integers(0, 5), per_sample=st.integers(1, 5))
def test_missing_entries_of_a_list_are_sampled_last(seed, num_there, per_sample):
    entries = np.full((1, 5), MISSING)
    entries[0, :num_there] = np.arange(num_there)

    (drawn,) = sample_columns(entries, per_sample, np.random.default_rng(seed))

    assert len(set(drawn.tolist())) == min(per_sample, max(1, num_there))
    assert (MISSING in drawn) == (num_there == 0)


@pytest.mark.parametrize("num_compared", [1, 7, 1000])
def test_a_large_corpus_is_searched_in_chunks_with_the_same_result(monkeypatch, num_compared):
    rng = np.random.default_rng(0)
    images = np.arange(12).repeat(3)
    captions, embeddings = captions_of(images, rng.integers(0, 30, 36)), embeddings_of(images, 12, rng, num_folds=2)
    whole = hard_negatives(embeddings, captions, positives_of(captions), 3)
    retrieves = retrieved_positives(embeddings, captions, *whole)
    monkeypatch.setattr(search_module, "MAX_PRODUCT_VALUES", num_compared)

    pieces = hard_negatives(embeddings, captions, positives_of(captions), 3)
    some = hard_negative_images(embeddings, captions, positives_of(captions), np.array([1, 20, 35]), 3)

    np.testing.assert_array_equal(whole[0], pieces[0])
    np.testing.assert_array_equal(whole[1], pieces[1])
    np.testing.assert_array_equal(some, whole[0][[1, 20, 35]])
    np.testing.assert_array_equal(retrieved_positives(embeddings, captions, *pieces), retrieves)


def test_pools_have_the_wanted_size_and_keep_groups_together():
    groups = [f"g{number // 4}" for number in range(40)] + [None] * 10

    pools = search_pools(groups, 10, seed=1)

    assert len(set(pools.tolist())) == 5
    assert all(len(set(pools[start : start + 4].tolist())) == 1 for start in range(0, 40, 4))
    assert not search_pools(groups, None, seed=1).any()


RECIPE = FirstStageRecipe(kind="cca", dim=3, folds=3)
NUM_IMAGES, WORDS = 30, 12


def described(seed=0):
    """Images whose features determine the words of their captions."""
    rng = np.random.default_rng(seed)
    images = np.arange(NUM_IMAGES).repeat(2)
    pooled = rng.random((NUM_IMAGES, 6)).astype(np.float32)
    ids = np.zeros((len(images), 6), np.int32)
    ids[:, 0], ids[:, 5] = 2, 3
    ids[:, 1:5] = 4 + np.argsort(pooled[images] @ rng.normal(size=(6, WORDS)), axis=1)[:, -4:]
    return Captions(tuple("x" * len(ids)), ids, np.full(len(ids), 6), images, np.arange(len(ids))), pooled


def fit(captions, pooled, recipe=RECIPE):
    return cross_fit(recipe, captions, pooled, vocab_size=4 + WORDS, seed=0)


def test_a_fold_is_embedded_by_a_model_fitted_without_it():
    captions, pooled = described()
    _, before = fit(captions, pooled)
    in_fold = before.caption_folds == 1
    ids = captions.ids.copy()
    ids[np.flatnonzero(in_fold), 1] = 4  # every caption of the fold now begins with this word

    model, after = fit(replace(captions, ids=ids), pooled)

    # The fold's images are embedded without its captions, so nothing of theirs moves; all others' do.
    np.testing.assert_array_equal(after.images[before.image_folds == 1], before.images[before.image_folds == 1])
    assert (after.images[before.image_folds != 1] != before.images[before.image_folds != 1]).any(axis=1).all()
    # Captions of the fold that already began so are embedded as before.
    same = in_fold & (captions.ids == ids).all(axis=1)
    np.testing.assert_array_equal(after.captions[same], before.captions[same])
    assert model.config.dim == RECIPE.dim


def test_only_pairs_of_one_fold_have_a_score():
    _, embeddings = fit(*described())
    rows, columns = np.arange(len(embeddings.captions)), np.arange(NUM_IMAGES)

    similarity = embeddings.similarity(rows, columns)

    same = embeddings.caption_folds[:, None] == embeddings.image_folds[None, :]
    assert np.isfinite(similarity).tolist() == same.tolist()
    assert sorted(np.bincount(embeddings.image_folds).tolist()) == [10, 10, 10]


def test_the_final_first_stage_is_fitted_on_all_data():
    captions, pooled = described()

    model, embeddings = fit(captions, pooled)

    own = model.image_vectors(pooled)
    np.testing.assert_allclose(np.linalg.norm(own, axis=1), 1.0, rtol=1e-5)
    assert all((own[number] != embeddings.images[number]).any() for number in range(NUM_IMAGES))
    with torch.no_grad():
        texts = model.embed_texts(torch.from_numpy(captions.ids.astype(np.int64)), torch.from_numpy(captions.lengths))
    ranks = (texts.numpy() @ own.T).argsort(axis=1)[:, ::-1]
    assert np.mean([row[0] == image for row, image in zip(ranks, captions.images, strict=True)]) > 1 / NUM_IMAGES


@pytest.mark.parametrize("is_empty", [False, True])
def test_too_little_data_to_fit_a_first_stage_is_refused(is_empty):
    captions, pooled = described()
    ids = captions.ids.copy()
    if is_empty:
        ids[:, 1:5] = 1000 + np.arange(4 * len(ids)).reshape(-1, 4)  # no word comes twice
    else:
        pooled = np.zeros_like(pooled)

    with pytest.raises(RecipeError, match="no first stage can be fitted on 40 captions of 20 images"):
        cross_fit(RECIPE, replace(captions, ids=ids), pooled, vocab_size=2000, seed=0)

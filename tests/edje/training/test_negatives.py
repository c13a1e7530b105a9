"""Negatives: never a true pair, the hardest first, and from models that have not seen the pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.recipe import FirstStageRecipe, Negatives, RecipeError
from edje.training.batches.sampling import batch_miner, corpus_miner
from edje.training.corpus import Captions
from edje.training.first_stage import pairs as pairs_module
from edje.training.first_stage.candidates import miner_for
from edje.training.first_stage.pairs import (
    FirstStageViews,
    best_mistakes,
    cross_fit,
    handed_over,
    mistaken_images,
    score_spread,
    search_pools,
)
from edje.training.negatives import NONE, Truth, draw, mine

seeds = st.integers(0, 2**32 - 1)


@st.composite
def corpora(draw):
    """Captions of a few images, of which some are worded alike, and what a first stage says of them."""
    num_images = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(seeds))
    images = np.sort(np.concatenate((np.arange(num_images), rng.integers(0, num_images, draw(st.integers(0, 12))))))
    keys = rng.integers(0, draw(st.integers(1, 20)), len(images))
    return captions_of(images, keys), views_of(images, num_images, rng, num_folds=draw(st.integers(1, 3)))


def captions_of(images, keys):
    ids = np.tile(np.array([[2, 9, 3]], np.int32), (len(images), 1))
    return Captions(tuple("x" * len(images)), ids, np.full(len(images), 3), images, keys)


def views_of(images, num_images, rng, num_folds=1):
    folds = np.arange(num_images) % num_folds
    vectors = [rng.normal(size=(number, 4)).astype(np.float32) for number in (len(images), num_images)]
    return FirstStageViews(*vectors, folds[images], folds)


def is_true(captions, caption, image):
    """Word for word: the image has a caption that reads like this one."""
    return any(captions.keys[other] == captions.keys[caption] for other in np.flatnonzero(captions.images == image))


def truth_of(captions):
    return Truth(captions.keys, captions.images)


@settings(max_examples=40, deadline=None)
@given(corpus=corpora())
def test_a_caption_is_true_of_its_image_and_of_those_with_an_equal_caption(corpus):
    captions, views = corpus
    rows, columns = np.arange(len(captions)), np.arange(len(views.images))

    found = truth_of(captions).of(rows, columns)

    assert found.tolist() == [[is_true(captions, row, column) for column in columns] for row in rows]


def test_an_equal_caption_counts_though_the_batch_does_not_hold_it():
    # Caption 0 of image 0 reads like caption 2 of image 1, for which caption 1 stands in the batch.
    captions = captions_of(np.array([0, 1, 1]), np.array([7, 8, 7]))

    assert truth_of(captions).of(np.array([0, 1]), np.array([0, 1])).tolist() == [[True, True], [False, True]]


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), per_sample=st.integers(1, 3), more=st.integers(0, 4), seed=seeds, from_corpus=st.booleans())
def test_no_mined_negative_is_true(corpus, per_sample, more, seed, from_corpus):
    captions, views = corpus
    truth, rng = truth_of(captions), np.random.default_rng(seed)
    if from_corpus:
        listed = best_mistakes(views, captions, truth, per_sample + more)
        finds = handed_over(views, captions, *listed)
        miner = corpus_miner(*listed, finds, per_sample)
    else:
        miner = batch_miner(views.similarity, truth, per_sample, per_sample + more)
    batch = rng.permutation(len(captions))[: rng.integers(1, len(captions) + 1)]

    images_for, captions_for = miner(batch, captions.images[batch], rng)

    assert images_for.shape == captions_for.shape == (len(batch), per_sample)
    in_reach = np.arange(len(captions)) if from_corpus else batch
    for row, caption in enumerate(batch):
        image = captions.images[caption]
        wrong_images = {
            int(captions.images[other])
            for other in in_reach
            if views.text_folds[other] == views.text_folds[caption]
            and not is_true(captions, caption, captions.images[other])
        }
        wrong_captions = {
            int(other)
            for other in in_reach
            if views.text_folds[other] == views.text_folds[caption] and not is_true(captions, other, image)
        }
        both = ((images_for[row], wrong_images), (captions_for[row], wrong_captions))
        for way, (found, wrong) in enumerate(both):
            if wrong and (not from_corpus or finds[way][caption]):
                assert set(found.tolist()) <= wrong
                # A batch may hold an image twice, and then it may be met twice.
                assert not from_corpus or len(set(found.tolist())) == min(per_sample, len(wrong))
            else:
                assert set(found.tolist()) == {NONE}


@settings(max_examples=30, deadline=None)
@given(corpus=corpora(), num_wanted=st.integers(1, 4))
def test_the_hardest_are_taken_where_nothing_is_left_to_chance(corpus, num_wanted):
    captions, views = corpus
    truth = truth_of(captions)
    rows, columns = np.arange(len(captions)), np.arange(len(views.images))
    similarity, positive = views.similarity(rows, columns), truth.of(rows, columns)

    mined = mine(similarity, positive, per_sample=num_wanted, top_k=num_wanted, rng=np.random.default_rng(0))
    listed, listed_captions = best_mistakes(views, captions, truth, num_wanted)

    masked = np.where(positive, -np.inf, similarity)
    for one, other, lines in ((mined, listed, masked), (None, listed_captions, masked.T)):
        for row, line in enumerate(lines):
            best = [int(column) for column in np.argsort(-line)[:num_wanted] if np.isfinite(line[column])]
            assert other[row].tolist() == best + [NONE] * (num_wanted - len(best))
            assert one is None or set(one[row].tolist()) == set(best or [NONE])


@settings(max_examples=40, deadline=None)
@given(corpus=corpora(), num_kept=st.integers(1, 4))
def test_what_the_first_stage_does_not_hand_over_is_not_ranked(corpus, num_kept):
    captions, views = corpus
    truth = truth_of(captions)
    rows, columns = np.arange(len(captions)), np.arange(len(views.images))
    compared = views.similarity(rows, columns)
    wrong = np.where(truth.of(rows, columns), -np.inf, compared)
    own = compared[rows, captions.images]

    finds_image, finds_caption = handed_over(views, captions, *best_mistakes(views, captions, truth, num_kept))

    assert finds_image.tolist() == ((wrong > own[:, None]).sum(axis=1) < num_kept).tolist()
    above = (wrong[:, captions.images] > own[None, :]).sum(axis=0)  # captions that stand above an image's own
    assert finds_caption.tolist() == (above < num_kept).tolist()


def test_a_first_stage_that_finds_nothing_leaves_nothing_to_rank():
    captions, views = captions_of(np.arange(4), np.arange(4)), views_of(np.arange(4), 4, np.random.default_rng(0))
    views = replace(views, texts=-views.images)  # each caption is least like its own image
    wanted = Negatives(source="corpus", per_sample=1, top_k=1)

    with pytest.raises(RecipeError, match="no caption's image among its 1 best mistakes"):
        miner_for(wanted, views, captions, truth_of(captions), 1)


def test_more_than_are_kept_cannot_be_drawn():
    positive, rng = np.eye(2, 4, dtype=bool), np.random.default_rng(0)

    with pytest.raises(ValueError, match="3 negatives cannot be drawn from the 2"):
        mine(np.zeros((2, 4), np.float32), positive, per_sample=3, top_k=2, rng=rng)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, num_there=st.integers(0, 5), per_sample=st.integers(1, 5))
def test_what_is_missing_from_a_list_is_drawn_last(seed, num_there, per_sample):
    entries = np.full((1, 5), NONE)
    entries[0, :num_there] = np.arange(num_there)

    (drawn,) = draw(entries, per_sample, np.random.default_rng(seed))

    assert len(set(drawn.tolist())) == min(per_sample, max(1, num_there))
    assert (NONE in drawn) == (num_there == 0)


@pytest.mark.parametrize("num_compared", [1, 7, 1000])
def test_a_large_corpus_is_searched_piece_by_piece_with_the_same_outcome(monkeypatch, num_compared):
    rng = np.random.default_rng(0)
    images = np.arange(12).repeat(3)
    captions, views = captions_of(images, rng.integers(0, 30, 36)), views_of(images, 12, rng, num_folds=2)
    whole = best_mistakes(views, captions, truth_of(captions), 3)
    finds = handed_over(views, captions, *whole)
    monkeypatch.setattr(pairs_module, "_COMPARED", num_compared)

    pieces = best_mistakes(views, captions, truth_of(captions), 3)
    some = mistaken_images(views, captions, truth_of(captions), np.array([1, 20, 35]), 3)

    np.testing.assert_array_equal(whole[0], pieces[0])
    np.testing.assert_array_equal(whole[1], pieces[1])
    np.testing.assert_array_equal(some, whole[0][[1, 20, 35]])
    np.testing.assert_array_equal(handed_over(views, captions, *pieces), finds)


def test_scores_are_spread_as_those_of_all_that_is_handed_over():
    rng = np.random.default_rng(0)
    images = np.arange(4).repeat(2)
    captions, views = captions_of(images, np.arange(8)), views_of(images, 4, rng)
    rows, kept = np.array([0, 5]), np.array([[1, 3], [0, NONE]])

    mean, std = score_spread(views, captions, rows, kept)

    scores = [views.texts[row] @ views.images[image] for row, image in [(0, 1), (0, 3), (5, 0), (0, 0), (5, 2)]]
    assert (mean, std) == pytest.approx((np.mean(scores), np.std(scores)), abs=1e-6)


def test_pools_are_of_the_size_asked_for_and_keep_groups_together():
    groups = [f"g{number // 4}" for number in range(40)] + [None] * 10

    pools = search_pools(groups, 10, seed=1)

    assert len(set(pools.tolist())) == 5
    assert all(len(set(pools[start : start + 4].tolist())) == 1 for start in range(0, 40, 4))
    assert not search_pools(groups, None, seed=1).any()


RECIPE = FirstStageRecipe(kind="cca", dim=3, folds=3)
NUM_IMAGES, WORDS = 30, 12


def described(seed=0):
    """Images that say in their features which words their captions use."""
    rng = np.random.default_rng(seed)
    images = np.arange(NUM_IMAGES).repeat(2)
    pooled = rng.random((NUM_IMAGES, 6)).astype(np.float32)
    ids = np.zeros((len(images), 6), np.int32)
    ids[:, 0], ids[:, 5] = 2, 3
    ids[:, 1:5] = 4 + np.argsort(pooled[images] @ rng.normal(size=(6, WORDS)), axis=1)[:, -4:]
    return Captions(tuple("x" * len(ids)), ids, np.full(len(ids), 6), images, np.arange(len(ids))), pooled


def fit(captions, pooled, recipe=RECIPE):
    return cross_fit(recipe, captions, pooled, vocab_size=4 + WORDS, seed=0)


def test_what_embeds_a_fold_does_not_know_its_captions():
    captions, pooled = described()
    _, before = fit(captions, pooled)
    in_fold = before.text_folds == 1
    ids = captions.ids.copy()
    ids[np.flatnonzero(in_fold), 1] = 4  # every caption of the fold now begins with this word

    model, after = fit(replace(captions, ids=ids), pooled)

    # The fold's images are embedded without its captions, so nothing of theirs moves; all others' do.
    np.testing.assert_array_equal(after.images[before.image_folds == 1], before.images[before.image_folds == 1])
    assert (after.images[before.image_folds != 1] != before.images[before.image_folds != 1]).any(axis=1).all()
    # Captions of the fold that already began so are embedded as before.
    same = in_fold & (captions.ids == ids).all(axis=1)
    np.testing.assert_array_equal(after.texts[same], before.texts[same])
    assert model.config.dim == RECIPE.dim


def test_only_pairs_of_one_fold_are_compared():
    _, views = fit(*described())
    rows, columns = np.arange(len(views.texts)), np.arange(NUM_IMAGES)

    similarity = views.similarity(rows, columns)

    same = views.text_folds[:, None] == views.image_folds[None, :]
    assert np.isfinite(similarity).tolist() == same.tolist()
    assert sorted(np.bincount(views.image_folds).tolist()) == [10, 10, 10]


def test_the_first_stage_for_use_is_fitted_on_everything():
    captions, pooled = described()

    model, views = fit(captions, pooled)

    own = model.image_vectors(pooled)
    np.testing.assert_allclose(np.linalg.norm(own, axis=1), 1.0, rtol=1e-5)
    assert all((own[number] != views.images[number]).any() for number in range(NUM_IMAGES))
    with torch.no_grad():
        texts = model.embed_texts(torch.from_numpy(captions.ids.astype(np.int64)), torch.from_numpy(captions.lengths))
    ranks = (texts.numpy() @ own.T).argsort(axis=1)[:, ::-1]
    assert np.mean([row[0] == image for row, image in zip(ranks, captions.images, strict=True)]) > 1 / NUM_IMAGES


@pytest.mark.parametrize("is_empty", [False, True])
def test_too_little_to_be_fitted_on_is_refused(is_empty):
    captions, pooled = described()
    ids = captions.ids.copy()
    if is_empty:
        ids[:, 1:5] = 1000 + np.arange(4 * len(ids)).reshape(-1, 4)  # no word comes twice
    else:
        pooled = np.zeros_like(pooled)

    with pytest.raises(RecipeError, match="no first stage can be fitted on 40 captions of 20 images"):
        cross_fit(RECIPE, replace(captions, ids=ids), pooled, vocab_size=2000, seed=0)

"""The closed-form first stage: textbook correlations, and an encoder that computes the fitted maps."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from edje.first_stage.cca import MIN_CAPTIONS, CcaSettings, fit_cca

CLS, SEP, FIRST_WORD, VOCABULARY = 1, 2, 3, 15


def toy(num_images=120, texts_per_image=3, seed=0):
    """Images of six numbers, which determine the words of their texts among twelve."""
    rng = np.random.default_rng(seed)
    pooled = rng.normal(size=(num_images, 6)).astype(np.float32)
    likely = 1 / (1 + np.exp(-2 * pooled @ rng.normal(size=(6, VOCABULARY - FIRST_WORD))))
    image_of_text = np.repeat(np.arange(num_images), texts_per_image)
    texts = []
    for image in image_of_text:
        used = FIRST_WORD + np.flatnonzero(rng.random(VOCABULARY - FIRST_WORD) < likely[image])
        texts.append(rng.permutation(used).tolist() or [FIRST_WORD])
    return pooled, texts, image_of_text


def plain_bags(texts):
    """Bags of words by the definition, (texts, words): inverse document frequencies, each text of unit length."""
    present = np.array([[word in text for word in range(FIRST_WORD, VOCABULARY)] for text in texts], np.float64)
    bags = present * np.log(len(texts) / present.sum(axis=0))
    return bags / np.linalg.norm(bags, axis=1, keepdims=True)


def canonical_correlations(left, right):
    """Cosines of the angles between the two column spaces, from orthonormal bases."""
    bases = [np.linalg.qr(side - side.mean(axis=0))[0] for side in (left, right)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def projections(model, pooled, texts):
    """Images and texts under the fitted maps, before normalisation."""
    import torch

    with torch.no_grad():
        images = torch.from_numpy(pooled)
        power = model.config.image_power
        left = model.image_out(images.sign() * images.abs() ** power)
        ids = [[CLS, *text, SEP] for text in texts]
        padded = torch.tensor([each + [0] * (VOCABULARY + 2 - len(each)) for each in ids])
        is_text = torch.arange(padded.shape[1]) < torch.tensor([[len(each)] for each in ids])
        right = model.text_out(model._word_sum(padded, is_text))
    return left.double().numpy(), right.double().numpy()


UNTAMED = CcaSettings(dim=4, ridge=1e-6, correlation_power=0.0, image_power=1.0)


def test_without_ridge_the_correlations_are_the_canonical_ones():
    pooled, texts, image_of_text = toy()
    expected = canonical_correlations(pooled[image_of_text].astype(np.float64), plain_bags(texts))

    model = fit_cca(pooled, texts, image_of_text, VOCABULARY, UNTAMED)

    left, right = projections(model, pooled, texts)
    left = left[image_of_text]
    found = [np.corrcoef(left[:, number], right[:, number])[0, 1] for number in range(4)]
    assert found == pytest.approx(expected[:4], abs=1e-3)
    # Directions of one side are uncorrelated and of unit variance.
    for side in (left, right):
        assert np.cov(side.T) == pytest.approx(np.eye(4), abs=0.02)


def test_scikit_learn_finds_the_same_correlations():
    decomposition = pytest.importorskip("sklearn.cross_decomposition")
    pooled, texts, image_of_text = toy()
    peers = decomposition.CCA(n_components=3, scale=False, max_iter=5000, tol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peers.fit_transform(pooled[image_of_text].astype(np.float64), plain_bags(texts))

    model = fit_cca(pooled, texts, image_of_text, VOCABULARY, UNTAMED)

    left, right = projections(model, pooled, texts)
    ours = (left[image_of_text], right)
    for number in range(3):
        expected = np.corrcoef(theirs[0][:, number], theirs[1][:, number])[0, 1]
        assert np.corrcoef(ours[0][:, number], ours[1][:, number])[0, 1] == pytest.approx(expected, abs=2e-3)


def test_directions_are_weighted_by_their_correlation():
    pooled, texts, image_of_text = toy()
    flat = fit_cca(pooled, texts, image_of_text, VOCABULARY, UNTAMED)

    weighted = fit_cca(
        pooled, texts, image_of_text, VOCABULARY, CcaSettings(dim=4, ridge=1e-6, correlation_power=2.0, image_power=1.0)
    )

    ratio = np.std(projections(weighted, pooled, texts)[0], axis=0) / np.std(
        projections(flat, pooled, texts)[0], axis=0
    )
    correlations = canonical_correlations(pooled[image_of_text].astype(np.float64), plain_bags(texts))
    assert ratio == pytest.approx(correlations[:4] ** 2, abs=5e-3)


def test_a_fitted_encoder_finds_images_of_unseen_texts():
    pooled, texts, image_of_text = toy(num_images=400)
    known = image_of_text < 300
    model = fit_cca(
        pooled[:300], [text for text, is_known in zip(texts, known, strict=True) if is_known],
        image_of_text[known], VOCABULARY, CcaSettings(dim=6, ridge=0.01, image_power=1.0),
    )  # fmt: skip

    ids = [[CLS, *text, SEP] for text, is_known in zip(texts, known, strict=True) if not is_known]
    similarity = model.caption_vectors([""] * len(ids), ids) @ model.image_vectors(pooled[300:]).T

    own = similarity[np.arange(len(ids)), image_of_text[~known] - 300]
    ranks = (similarity > own[:, None]).sum(axis=1)
    assert np.median(ranks) < 15  # of 100 images; chance is 50


def test_rare_words_and_special_tokens_are_ignored():
    pooled, texts, image_of_text = toy()
    rare = VOCABULARY - 1
    texts = [[word for word in text if word != rare] or [FIRST_WORD] for text in texts]
    for text in texts[: MIN_CAPTIONS - 1]:
        text.append(rare)
    model = fit_cca(pooled, texts, image_of_text, VOCABULARY, CcaSettings(dim=4))

    plain, with_rare = model.caption_vectors(["", ""], [[CLS, 4, 5, SEP], [CLS, 4, rare, 5, SEP]])

    assert with_rare == pytest.approx(plain, abs=1e-6)
    assert float(model.word_weights[[0, CLS, SEP, rare]].abs().max()) == 0.0


def test_more_directions_than_exist_change_nothing():
    pooled, texts, image_of_text = toy()
    six, hundred = (fit_cca(pooled, texts, image_of_text, VOCABULARY, CcaSettings(dim=dim)) for dim in (6, 100))

    padded = hundred.image_vectors(pooled)

    assert padded.shape == (len(pooled), 100)
    assert padded[:, :6] == pytest.approx(six.image_vectors(pooled), abs=1e-6)
    assert not padded[:, 6:].any()

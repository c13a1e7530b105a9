"""Canonical correlation analysis: a first stage fitted in closed form to pooled embeddings and bags of words.

The fitted encoder ranks the images of its training pairs far better than other images. A joint encoder that learns from
first-stage scores therefore needs scores of an encoder that was not fitted to the same pairs (cross-fitting).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import solve_triangular

from edje.first_stage.dual_encoder import DualEncoder, DualEncoderConfig

Matrix = NDArray[np.float32]
#: Words in fewer captions are ignored, because their correlations are mostly chance.
MIN_CAPTIONS = 5
#: Correlations up to this size come from rounding.
_NO_CORRELATION = 1e-6


@dataclass(frozen=True, slots=True)
class CcaSettings:
    """Settings of the fit.

    Attributes:
        dim: number of directions to keep.
        ridge: added to the diagonal of both covariances, in units of their mean variance.
        correlation_power: each direction is weighted by its correlation to this power.
        image_power: see `DualEncoderConfig`.
    """

    dim: int = 128
    ridge: float = 0.5
    correlation_power: float = 1.0
    image_power: float = 0.5


def fit_cca(
    pooled: Matrix, texts: list[list[int]], image_of_text: NDArray[np.int64], vocab_size: int, settings: CcaSettings
) -> DualEncoder:
    """Fit a dual encoder without layers.

    Args:
        pooled: pooled embeddings of the images, (N, E).
        texts: token ids of each text, without [CLS] and [SEP].
        image_of_text: row of the image of each text.
        vocab_size: size of the tokenizer's vocabulary.
        settings: of the fit.
    """
    weights, used = _word_weights(texts, vocab_size)
    bags = _bags(texts, weights, used)
    text_mean = bags.mean(axis=0)
    images = np.sign(pooled) * np.abs(pooled) ** settings.image_power
    image_mean, image_std = images.mean(axis=0), images.std(axis=0) + 1e-3
    images = (images - image_mean) / image_std
    bags -= text_mean
    # The covariance between images and texts needs only the sum of each image's texts.
    num_texts = np.bincount(image_of_text, minlength=len(images)).astype(np.float32)
    sums = np.zeros((len(images), bags.shape[1]), np.float32)
    np.add.at(sums, image_of_text, bags)
    left = _root((images * num_texts[:, None]).T @ images / len(texts), settings.ridge)
    right = _root(bags.T @ bags / len(texts), settings.ridge)
    cross = torch.from_numpy(images.T @ sums / len(texts)).double()
    # The singular values of the whitened cross-covariance are the correlations. An eigendecomposition of the smaller
    # Gram matrix gives their squares several times as fast.
    whitened = solve_triangular(left, cross, upper=False)
    whitened = solve_triangular(right, whitened.T, upper=False).T
    squares, u = torch.linalg.eigh(whitened @ whitened.T)
    correlations = squares.clamp(min=0).sqrt().flip(0)[: settings.dim]
    u = u.flip(1)[:, : settings.dim]
    # Directions without correlation, and those that pad the result to `dim`, are zero and change no dot product.
    strength = torch.where(correlations > _NO_CORRELATION, correlations**settings.correlation_power, 0.0)
    v = whitened.T @ u / correlations.clamp(min=_NO_CORRELATION)
    to_image = (solve_triangular(left.T, u, upper=True) * strength).numpy() / image_std[:, None]
    to_text = (solve_triangular(right.T, v, upper=True) * strength).numpy()
    padding = settings.dim - len(strength)
    to_image, to_text = (np.pad(each, ((0, 0), (0, padding))) for each in (to_image, to_text))
    return _as_model(to_image, image_mean, to_text, text_mean, weights, used, vocab_size, settings)


@torch.no_grad()
def _as_model(
    to_image: Matrix,
    image_mean: Matrix,
    to_text: Matrix,
    text_mean: Matrix,
    weights: Matrix,
    used: NDArray[np.int64],
    vocab_size: int,
    settings: CcaSettings,
) -> DualEncoder:
    dim = to_text.shape[1]
    model = DualEncoder(
        DualEncoderConfig(
            dim=dim,
            vocab_size=vocab_size,
            image_dim=len(to_image),
            text_dim=dim,
            num_heads=1,
            image_power=settings.image_power,
        )
    )
    model.words.weight.zero_()
    model.words.weight[torch.from_numpy(used)] = torch.from_numpy(to_text.astype(np.float32))
    model.word_weights.copy_(torch.from_numpy(weights))
    model.text_out.weight.copy_(torch.eye(dim))
    model.text_out.bias.copy_(torch.from_numpy(-(text_mean @ to_text)))
    model.image_out.weight.copy_(torch.from_numpy(to_image.T.astype(np.float32)))
    model.image_out.bias.copy_(torch.from_numpy(-(image_mean @ to_image)))
    return model.eval().requires_grad_(False)


def _word_weights(texts: list[list[int]], vocab_size: int) -> tuple[Matrix, NDArray[np.int64]]:
    """Inverse document frequencies (V,), zero for rare words, and the ids of the words that are not rare."""
    counts = np.zeros(vocab_size, np.int64)
    for words in texts:
        counts[list(set(words))] += 1
    used = np.flatnonzero(counts >= MIN_CAPTIONS)
    weights = np.zeros(vocab_size, np.float32)
    weights[used] = np.log(len(texts) / counts[used])
    return weights, used


def _bags(texts: list[list[int]], weights: Matrix, used: NDArray[np.int64]) -> Matrix:
    """Weighted bags of words of unit length, (C, number of used words)."""
    column = np.full(len(weights), -1)
    column[used] = np.arange(len(used))
    bags = np.zeros((len(texts), len(used)), np.float32)
    for row, words in zip(bags, texts, strict=True):
        known = [word for word in set(words) if column[word] >= 0]
        row[column[known]] = weights[known]
    norms = np.linalg.norm(bags, axis=1, keepdims=True)
    bags /= np.maximum(norms, 1e-12)
    return bags


def _root(covariance: NDArray[np.floating], ridge: float) -> Tensor:
    """Cholesky factor of the covariance with the ridge on its diagonal."""
    damped = torch.from_numpy(covariance).double()
    damped.diagonal().add_(ridge * float(damped.diagonal().mean()))
    root: Tensor = torch.linalg.cholesky(damped)
    return root

"""Canonical correlation analysis: a first stage fitted in closed form, and cross-fitted for its own training pairs.

On the images it was fitted on, such a model ranks far better than on any other; scores and mistakes of training pairs
must therefore come from a model that has not seen them, or whatever learns from them learns to trust it too much.
Fits and returns weights; trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import solve_triangular

from edje.first_stage.dual_encoder import FirstStageModel, FirstStageModelConfig

Matrix = NDArray[np.float32]
#: A word in fewer captions than this says more about the photographer than about the picture.
MIN_CAPTIONS = 5
#: Rounding alone makes correlations up to about this large.
_NO_CORRELATION = 1e-6


@dataclass(frozen=True, slots=True)
class CcaSettings:
    """`ridge` is added to both covariances, as a multiple of their mean variance.

    Directions count by the `correlation_power`-th power of their correlation.
    """

    dim: int = 128
    ridge: float = 0.5
    correlation_power: float = 1.0
    image_power: float = 0.5


def fit_cca(
    pooled: Matrix, texts: list[list[int]], image_of_text: NDArray[np.int64], vocab_size: int, settings: CcaSettings
) -> FirstStageModel:
    """(N, E) pooled embeddings, word ids of each text without [CLS] and [SEP], and the image of each."""
    weights, used = _word_weights(texts, vocab_size)
    bags = _bags(texts, weights, used)
    text_mean = bags.mean(axis=0)
    images = np.sign(pooled) * np.abs(pooled) ** settings.image_power
    image_mean, image_std = images.mean(axis=0), images.std(axis=0) + 1e-3
    images = (images - image_mean) / image_std
    bags -= text_mean
    # Per image the mean of its texts is enough for the covariance between the two sides.
    num_texts = np.bincount(image_of_text, minlength=len(images)).astype(np.float32)
    sums = np.zeros((len(images), bags.shape[1]), np.float32)
    np.add.at(sums, image_of_text, bags)
    left = _root((images * num_texts[:, None]).T @ images / len(texts), settings.ridge)
    right = _root(bags.T @ bags / len(texts), settings.ridge)
    cross = torch.from_numpy(images.T @ sums / len(texts)).double()
    # Between whitened sides the singular values are the correlations. Their squares are the eigenvalues of the smaller
    # Gram matrix, which are found several times as fast.
    whitened = solve_triangular(left, cross, upper=False)
    whitened = solve_triangular(right, whitened.T, upper=False).T
    squares, u = torch.linalg.eigh(whitened @ whitened.T)
    correlations = squares.clamp(min=0).sqrt().flip(0)[: settings.dim]
    u = u.flip(1)[:, : settings.dim]
    # Where there are fewer directions the rest is zero, which changes no comparison.
    strength = torch.where(correlations > _NO_CORRELATION, correlations**settings.correlation_power, 0.0)
    v = whitened.T @ u / correlations.clamp(min=_NO_CORRELATION)
    to_image = (solve_triangular(left.T, u, upper=True) * strength).numpy() / image_std[:, None]
    to_text = (solve_triangular(right.T, v, upper=True) * strength).numpy()
    num_lacking = settings.dim - len(strength)
    to_image, to_text = (np.pad(each, ((0, 0), (0, num_lacking))) for each in (to_image, to_text))
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
) -> FirstStageModel:
    dim = to_text.shape[1]
    model = FirstStageModel(
        FirstStageModelConfig(
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
    """The inverse document frequency of each word that is frequent enough, zero for the others; and which these are."""
    counts = np.zeros(vocab_size, np.int64)
    for words in texts:
        counts[list(set(words))] += 1
    used = np.flatnonzero(counts >= MIN_CAPTIONS)
    weights = np.zeros(vocab_size, np.float32)
    weights[used] = np.log(len(texts) / counts[used])
    return weights, used


def _bags(texts: list[list[int]], weights: Matrix, used: NDArray[np.int64]) -> Matrix:
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
    """The lower triangular root of a covariance with something added to its diagonal."""
    damped = torch.from_numpy(covariance).double()
    damped.diagonal().add_(ridge * float(damped.diagonal().mean()))
    root: Tensor = torch.linalg.cholesky(damped)
    return root

"""Fits a model's calibration on pairs that it was not trained on: the weight of the first stage, temperature, offset.

Works on the logits of each query's best candidates, in the first stage's order. Knows neither the model nor its data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edje.calibration import DirectionCalibration, sigmoid
from edje.evaluation.protocol import Scorer, first_stage, score_top
from edje.evaluation.task import RetrievalTask
from edje.first_stage_scores import of_ranks

#: Weights of the standardised first-stage score that are tried, in log-odds of being the right candidate. With 1, the
#: candidate of rank r is a priori r times less likely than the best one.
_PRIOR_WEIGHTS = np.linspace(0.0, 3.0, 31)
#: Log-odds that are tried for a difference between logits of one standard deviation within a query.
_LOGIT_WEIGHTS = np.geomspace(0.01, 30.0, 40)
#: Standard errors by which a first stage must lower the loss, so that a model which does not need one ignores it.
_SIGNIFICANT = 2.0
#: The slope per standard deviation is at least this, so that a temperature exists and the order is kept.
_SMALLEST_SLOPE = 1e-4
_SMALLEST_SCALE = 1e-12
_NEWTON_STEPS = 100


def calibrate(task: RetrievalTask, scorer: Scorer, k: int) -> DirectionCalibration:
    """Fit one direction on a task's queries and the first stage's best k candidates of each. Raises `EvaluationError`.

    `scorer` returns the model's logits of (query, candidate) pairs.
    """
    best = first_stage(task, k).top
    return fit(score_top(scorer, best), task.is_positive(best))


def fit(logits: NDArray[np.floating], is_positive: NDArray[np.bool_]) -> DirectionCalibration:
    """Fit to `(queries, k)` logits and positives; the columns are the ranks of the first stage.

    The gain has the least cross-entropy of a positive among a query's candidates, each gain with its best factor of the
    logit: rankings depend on the gain alone. Temperature and offset are Platt's (1999): logistic regression with
    smoothed targets over all pairs, those of queries without a positive included.
    """
    exact = logits.astype(np.float64)
    prior = np.broadcast_to(of_ranks(np.arange(1, exact.shape[1] + 1)).astype(np.float64), exact.shape)
    gain = _best_gain(exact, prior, is_positive)
    slope, offset = _platt((exact + gain * prior).ravel(), is_positive.ravel())
    return DirectionCalibration(temperature=1.0 / slope, offset=offset, first_stage_gain=gain)


def _best_gain(logits: NDArray[np.float64], prior: NDArray[np.float64], is_positive: NDArray[np.bool_]) -> float:
    """The gain of the first stage; 0 if its benefit is not significant, or if no query has a positive."""
    has_positive = is_positive.any(axis=1)
    if not has_positive.any():
        return 0.0
    logits, prior, is_positive = logits[has_positive], prior[has_positive], is_positive[has_positive]
    scale = max(float((logits - logits.mean(axis=1, keepdims=True)).std()), _SMALLEST_SCALE)
    logits = logits / scale
    alone: NDArray[np.float64] | None = None
    best, gain = np.inf, 0.0
    best_losses = np.zeros(len(logits))
    for prior_weight in _PRIOR_WEIGHTS:
        for logit_weight in _LOGIT_WEIGHTS:
            losses = _losses(logit_weight * logits + prior_weight * prior, is_positive)
            if losses.mean() < best:
                best, best_losses, gain = losses.mean(), losses, float(prior_weight / logit_weight * scale)
        if alone is None:  # the first weight is 0
            alone = best_losses
    assert alone is not None
    saved = alone - best_losses
    return gain if saved.mean() > _SIGNIFICANT * saved.std() / np.sqrt(len(saved)) else 0.0


def _losses(scores: NDArray[np.float64], is_positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Minus the log of the probability that a draw by softmax of `(queries, k)` scores is a positive: (queries,)."""
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    share = (weights * is_positive).sum(axis=1) / weights.sum(axis=1)
    losses: NDArray[np.float64] = -np.log(np.maximum(share, np.finfo(np.float64).tiny))
    return losses


def _platt(scores: NDArray[np.float64], is_positive: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset of the log-odds by Newton's method; the slope is positive."""
    num_positives = int(is_positive.sum())
    targets = np.where(
        is_positive, (num_positives + 1) / (num_positives + 2), 1 / (len(is_positive) - num_positives + 2)
    )
    centre, scale = scores.mean(), max(float(scores.std()), _SMALLEST_SCALE)
    inputs = np.stack(((scores - centre) / scale, np.ones_like(scores)), axis=1)
    weights = np.array([0.0, np.log(targets.mean() / (1 - targets.mean()))])
    loss = _log_loss(inputs @ weights, targets)
    for _ in range(_NEWTON_STEPS):
        probabilities = sigmoid(inputs @ weights)
        gradient = inputs.T @ (probabilities - targets)
        curvature = (inputs * (probabilities * (1 - probabilities))[:, None]).T @ inputs
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), gradient)
        while (after := _log_loss(inputs @ (weights - step), targets)) > loss and np.abs(step).max() > 1e-12:
            step /= 2
        weights = weights - step
        if loss - after < 1e-12 * len(scores):
            break
        loss = after
    slope = max(float(weights[0]), _SMALLEST_SLOPE) / scale
    return slope, float(weights[1] - slope * centre)


def _log_loss(log_odds: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    return float((np.logaddexp(0.0, log_odds) - targets * log_odds).sum())

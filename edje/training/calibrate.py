"""How much the first stage's score counts in the logit: one number, found on the dev split.

What a model learned from is ranked far better by it than anything new, so on training pairs its own terms seem to need
no first stage. Pairs that it has not seen say how much of it helps. Nothing else is changed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edje.training.dev_retrieval import DevSearch

#: Gains that are tried, as multiples of one standard deviation of the candidates' scores.
GAINS = np.concatenate(([0.0], np.geomspace(0.05, 200.0, 80)))
#: What all logits are multiplied with, as far as it helps.
SHARPNESS = np.geomspace(0.005, 5.0, 30)


def candidates_of(search: DevSearch) -> NDArray[np.int64]:
    """(captions, k): the first stage's best images for each caption."""
    best: NDArray[np.int64] = np.argsort(-search.similarity, axis=1, kind="stable")[:, : search.k]
    return best


def best_gain(search: DevSearch, gain: float, mean: float, std: float) -> float:
    """The gain with the least cross-entropy of the right image among a caption's candidates, at its best sharpness.

    A model that has learned its training pairs by heart is too sure of all others. At the sharpness it has, its terms
    would seem to need less of the first stage than they do; ranks depend on the gain alone. `gain`, `mean` and `std`
    are those the model has now. Captions whose image is not among the candidates say nothing; where there is none at
    all, the present gain is kept.
    """
    candidates = candidates_of(search)
    captions = np.repeat(np.arange(len(candidates)), search.k)
    logits = search.scorers.joint(search.similarity)(captions, candidates.reshape(-1)).reshape(candidates.shape)
    standard = (np.take_along_axis(search.similarity, candidates, axis=1) - mean) / std
    is_right = candidates == search.image_of_caption[:, None]
    says = is_right.any(axis=1)
    if not says.any():
        return gain
    own, standard, is_right = (logits - gain * standard)[says], standard[says], is_right[says]
    losses = [
        min(_cross_entropy(sharpness * (own + each * standard), is_right) for sharpness in SHARPNESS) for each in GAINS
    ]
    return float(GAINS[int(np.argmin(losses))])


def _cross_entropy(logits: NDArray[np.floating], is_right: NDArray[np.bool_]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    return float((log_sum - shifted[is_right]).mean())

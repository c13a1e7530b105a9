"""A checkpoint's model as scorers of (caption, image) pairs, in torch.

Only captions of one length share a batch, so nothing is padded and a score does not depend on other captions' lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edje.config import JointConfig
from edje.evaluation.cost import ScorerCost, scorer_cost
from edje.model.edje import Edje
from edje.model.flops import Cost, cost_of
from edje.model.late_fusion import LateFusionEncoder, LateInteraction

#: Enough pairs to keep two cores or one GPU busy: 256 x 96 tokens x 1,536 hidden values are 150 MB.
BATCH_PAIRS = 256
BATCH_CAPTIONS = 256
#: Number of token similarities in memory at once: 64 MB.
_MATRIX_VALUES = 16_000_000

_ScorePairs = Callable[[Tensor, Tensor], Tensor]


class TorchScorers:
    """Text states and visual tokens of a split, and the scorers of their pairs.

    Each caption is encoded once, when a pair first needs it.
    """

    def __init__(
        self, model: Edje, text_ids: Sequence[Sequence[int]], tokens: NDArray[np.float32], *, device: str = "cpu"
    ) -> None:
        self._model = model.to(device)
        self._device = torch.device(device)
        self._tokens = torch.from_numpy(tokens).to(self._device)
        self._text_ids = text_ids
        self._lengths = np.array([len(ids) for ids in text_ids])
        self._rows = np.empty(len(text_ids), np.int64)  # index among the captions of the same length
        for length in np.unique(self._lengths):
            captions = np.flatnonzero(self._lengths == length)
            self._rows[captions] = np.arange(len(captions))
        self._is_encoded = np.zeros(len(text_ids), bool)
        self._states: dict[int, Tensor] = {}  # by length: (captions, length, d)

    @property
    def _match(self) -> LateInteraction | None:
        joint = self._model.joint
        return joint.match if isinstance(joint, LateFusionEncoder) else None

    @property
    def has_late_interaction(self) -> bool:
        return self._match is not None

    def joint(self) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]:
        """A scorer that returns the model's logits."""

        def score(text: Tensor, visual: Tensor) -> Tensor:
            return self._model.score(text, visual, None)

        return lambda captions, images: self._by_length(score, captions, images)

    def late_interaction(self) -> Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]:
        """A scorer that returns the late interaction alone; requires `has_late_interaction`."""
        match = self._match
        assert match is not None, "the caller checks has_late_interaction"

        with torch.no_grad():
            projected = match.project_visual(self._tokens)  # once per image, and texts once per batch, not per pair

        def score(text: Tensor, visual: Tensor) -> Tensor:
            return match.compare(text, visual, None)

        return lambda captions, images: self._by_length(
            score, captions, images, visual=projected, prepare_text=match.project_text
        )

    @torch.no_grad()
    def late_interaction_matrix(self) -> NDArray[np.float32]:
        """The late interaction of every caption with every image, (captions, images), for use as a first stage."""
        match = self._match
        assert match is not None, "the caller checks has_late_interaction"
        num_images, num_visual = self._tokens.shape[:2]
        matrix = np.empty((len(self._lengths), num_images), np.float32)
        for length in map(int, np.unique(self._lengths)):
            captions = np.flatnonzero(self._lengths == length)
            states = self._encoded(length, captions)
            step = max(1, _MATRIX_VALUES // (num_images * length * num_visual))
            for start in range(0, len(captions), step):
                scores = match.score_matrix(states[start : start + step], self._tokens, None)
                matrix[captions[start : start + step]] = scores.float().cpu().numpy()
        return matrix

    @torch.no_grad()
    def _by_length(
        self,
        score: _ScorePairs,
        captions: NDArray[np.int64],
        images: NDArray[np.int64],
        *,
        visual: Tensor | None = None,
        prepare_text: Callable[[Tensor], Tensor] = lambda text: text,
    ) -> NDArray[np.float32]:
        """Scores of pairs. `visual` has a row per image (default: the tokens); `prepare_text` maps a batch's states."""
        by_image = self._tokens if visual is None else visual
        scores = np.empty(len(captions), np.float32)
        lengths = self._lengths[captions]
        for length in map(int, np.unique(lengths)):
            pairs = np.flatnonzero(lengths == length)
            for start in range(0, len(pairs), BATCH_PAIRS):
                some = pairs[start : start + BATCH_PAIRS]
                texts, text_of_pair = np.unique(captions[some], return_inverse=True)
                states = self._encoded(length, texts)[self._on_device(self._rows[texts])]
                text = prepare_text(states)[self._on_device(text_of_pair)]
                scores[some] = score(text, by_image[self._on_device(images[some])]).float().cpu().numpy()
        return scores

    def _encoded(self, length: int, captions: NDArray[np.int64]) -> Tensor:
        """(captions of this length, length, d) states; computes the missing ones among `captions`."""
        missing = np.unique(captions[~self._is_encoded[captions]])
        for start in range(0, len(missing), BATCH_CAPTIONS):
            some = missing[start : start + BATCH_CAPTIONS]
            ids = torch.tensor([list(self._text_ids[int(caption)]) for caption in some], device=self._device)
            states = self._model.encode_queries(ids)
            if length not in self._states:
                num_captions = int((self._lengths == length).sum())
                self._states[length] = states.new_empty((num_captions, *states.shape[1:]))
            self._states[length][self._on_device(self._rows[some])] = states
        self._is_encoded[missing] = True
        return self._states[length]

    def _on_device(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def joint_cost(config: JointConfig, text_lengths: Sequence[int], num_visual: int) -> ScorerCost:
    """The mean cost of a pair over captions of these lengths, [CLS] and [SEP] included."""
    costs = [cost_of(config, length, num_visual) for length in text_lengths]
    num = len(costs)
    mean = Cost(
        per_pair=sum(cost.per_pair for cost in costs) // num,
        per_query=sum(cost.per_query for cost in costs) // num,
        per_image=costs[0].per_image,
    )
    return scorer_cost(mean)


def late_interaction_cost(config: JointConfig, text_lengths: Sequence[int], num_visual: int) -> ScorerCost:
    """The mean cost of the late interaction alone, in an encoder that has one."""
    return joint_cost(replace(config, kind="maxsim", num_layers=0), text_lengths, num_visual)

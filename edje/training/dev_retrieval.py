"""Retrieval on the dev split with the model under training: validation after a phase, calibration at the end.

Encodes the split in memory; `edje.evaluation` computes the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edje.calibration import Calibration, Direction
from edje.data.dataset import Dataset
from edje.evaluation.comparison import evaluate
from edje.evaluation.protocol import Scorer, swapped
from edje.evaluation.task import RetrievalTask, image_to_text, text_to_image
from edje.evaluation.torch_scorers import TorchScorers
from edje.features.storage import Features
from edje.first_stage.base import FirstStageEncoder
from edje.model.edje import Edje
from edje.text import Tokenizer
from edje.training.batches.corpus import encode_captions
from edje.training.calibrate import calibrate
from edje.training.first_stage.search import embed

_BATCH_IMAGES = 64


@dataclass(frozen=True, slots=True)
class DevRetrieval:
    """The dev split as a task of each direction, with the scorers of its (caption, image) pairs."""

    tasks: Mapping[Direction, RetrievalTask]
    queries: NDArray[np.int64]  # the captions that are queries of text-to-image
    scorers: TorchScorers
    k: int  # candidates per query, limited by the number of images

    def model_scorer(self, direction: Direction) -> Scorer:
        """The model's logits of (query, candidate) pairs."""
        return self._directed(self.scorers.joint(), direction)

    def late_interaction_scorer(self, direction: Direction) -> Scorer:
        """The late interaction alone; requires a model that has one."""
        return self._directed(self.scorers.late_interaction(), direction)

    def _directed(self, scorer: Scorer, direction: Direction) -> Scorer:
        if direction == "image-to-text":
            return swapped(scorer)
        return lambda queries, candidates: scorer(self.queries[queries], candidates)


def dev_retrieval(
    model: Edje,
    first_stage: FirstStageEncoder,
    dataset: Dataset,
    tokenizer: Tokenizer,
    features: Features,
    *,
    k: int,
    num_captions: int,
    device: torch.device,
) -> DevRetrieval:
    """Encode the split with a model in evaluation mode. `num_captions` evenly spaced captions are queries."""
    captions = encode_captions(dataset, tokenizer, features.rows)
    texts, images = embed(first_stage, captions, features.pooled)
    # An image that is only a negative of candidate lists has no caption, and cannot be a query.
    rows = np.intersect1d(features.rows, captions.images)
    image_of_caption = np.searchsorted(rows, captions.images)
    similarity = (texts @ images[rows].T).astype(np.float32)
    queries = np.unique(np.linspace(0, len(captions) - 1, min(num_captions, len(captions))).astype(np.int64))
    return DevRetrieval(
        {
            "text-to-image": text_to_image(similarity[queries], image_of_caption[queries]),
            "image-to-text": image_to_text(similarity, image_of_caption),
        },
        queries,
        TorchScorers(model, captions.id_lists(), _encode_images(model, features, rows, device), device=str(device)),
        min(k, len(rows)),
    )


def validate(retrieval: DevRetrieval) -> dict[str, float]:
    """Text-to-image R@1 of the first stage, after reranking, and of the late interaction alone if the model has one."""
    task, k = retrieval.tasks["text-to-image"], retrieval.k
    reranked = evaluate(task, retrieval.model_scorer("text-to-image"), k, num_resamples=2).row("R@1")
    metrics = {"first_stage_r1": reranked.first_stage.value, "reranked_r1": reranked.reranked.value}
    if retrieval.scorers.has_late_interaction:
        late = evaluate(task, retrieval.late_interaction_scorer("text-to-image"), k, num_resamples=2)
        metrics["late_interaction_r1"] = late.row("R@1").reranked.value
    return metrics


def fit_calibration(retrieval: DevRetrieval) -> Calibration:
    """The calibration of both directions."""
    constants = {
        direction: calibrate(task, retrieval.model_scorer(direction), retrieval.k)
        for direction, task in retrieval.tasks.items()
    }
    return Calibration(constants["text-to-image"], constants["image-to-text"])


@torch.inference_mode()
def _encode_images(
    model: Edje, features: Features, rows: NDArray[np.int64], device: torch.device
) -> NDArray[np.float32]:
    """(images, m, d) visual tokens."""
    tokens = []
    for start in range(0, len(rows), _BATCH_IMAGES):
        patches = torch.from_numpy(features.tokens[rows[start : start + _BATCH_IMAGES]].astype(np.float32)).to(device)
        tokens.append(model.encode_patches(patches).float().cpu().numpy())
    return np.concatenate(tokens)

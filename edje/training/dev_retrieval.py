"""The dev split as it will be searched: some of its captions, the first stage's similarities, a scorer of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edje.data.dataset import Dataset
from edje.evaluation.task import RetrievalTask, text_to_image
from edje.evaluation.torch_scorers import TorchScorers
from edje.features.storage import Features
from edje.first_stage.base import FirstStageEncoder
from edje.model.edje import Edje
from edje.text import Tokenizer
from edje.training.batches.corpus import encode_captions
from edje.training.first_stage.search import embed

_BATCH_IMAGES = 64


@dataclass(frozen=True, slots=True)
class DevSearch:
    """Captions taken evenly from the split, over all of its images; k candidates each."""

    task: RetrievalTask
    similarity: NDArray[np.float32]  # (captions, images)
    image_of_caption: NDArray[np.int64]
    scorers: TorchScorers
    k: int


def dev_search(
    model: Edje,
    first_stage: FirstStageEncoder,
    dataset: Dataset,
    tokenizer: Tokenizer,
    features: Features,
    *,
    k: int,
    num_captions: int,
    device: torch.device,
) -> DevSearch:
    """Encode what is needed; the model is in evaluation."""
    captions = encode_captions(dataset, tokenizer, features.rows)
    texts, images = embed(first_stage, captions, features.pooled)
    asked = np.unique(np.linspace(0, len(captions) - 1, min(num_captions, len(captions))).astype(np.int64))
    rows = features.rows
    image_of_caption = np.searchsorted(rows, captions.images[asked])
    similarity = (texts[asked] @ images[rows].T).astype(np.float32)
    all_ids = captions.id_lists()
    scorers = TorchScorers(
        model, [all_ids[row] for row in asked], _stored_tokens(model, features, rows, device), device=str(device)
    )
    task = text_to_image(similarity, image_of_caption)
    return DevSearch(task, similarity, image_of_caption, scorers, min(k, len(rows)))


@torch.inference_mode()
def _stored_tokens(
    model: Edje, features: Features, rows: NDArray[np.int64], device: torch.device
) -> NDArray[np.float32]:
    tokens = []
    for start in range(0, len(rows), _BATCH_IMAGES):
        patches = torch.from_numpy(features.tokens[rows[start : start + _BATCH_IMAGES]].astype(np.float32)).to(device)
        tokens.append(model.encode_patches(patches).float().cpu().numpy())
    return np.concatenate(tokens)

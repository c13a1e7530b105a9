"""After a phase: how well the first stage and the reranker find the dev split's images for some of its captions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from edje.apart import ApartEncoder
from edje.data.dataset import Dataset
from edje.evaluation.comparison import evaluate
from edje.evaluation.task import text_to_image
from edje.evaluation.torch_scorers import TorchScorers
from edje.feature_files import Features
from edje.first_stage import FirstStage
from edje.model import Edje
from edje.text import Tokenizer
from edje.training.corpus import read_captions
from edje.training.pairs import embed

_BATCH_IMAGES = 64


def validate(
    model: Edje,
    first_stage: FirstStage,
    dataset: Dataset,
    tokenizer: Tokenizer,
    features: Features,
    *,
    k: int,
    num_captions: int,
    device: torch.device,
) -> dict[str, float]:
    """Recall of text-to-image search over all images of the split, for captions taken evenly from it."""
    captions = read_captions(dataset, tokenizer, features.rows)
    texts, images = embed(first_stage, captions, features.pooled)
    asked = np.unique(np.linspace(0, len(captions) - 1, min(num_captions, len(captions))).astype(np.int64))
    rows = features.rows
    image_of_caption = np.searchsorted(rows, captions.images[asked])
    similarity = (texts[asked] @ images[rows].T).astype(np.float32)
    tokens = _stored_tokens(model, features, rows, device)
    all_ids = captions.id_lists()
    text_ids = [all_ids[row] for row in asked]
    scorers = TorchScorers(model, text_ids, tokens, device=str(device))
    k = min(k, len(rows))
    task = text_to_image(similarity, image_of_caption)
    reranked = evaluate(task, scorers.joint(similarity), k, num_resamples=2)
    told = {"first_stage_r1": reranked.row("R@1").first_stage.value, "reranked_r1": reranked.row("R@1").reranked.value}
    if isinstance(model.joint, ApartEncoder) and model.joint.match is not None:
        late = evaluate(task, scorers.late_interaction(), k, num_resamples=2)
        told["late_interaction_r1"] = late.row("R@1").reranked.value
    return told


@torch.inference_mode()
def _stored_tokens(
    model: Edje, features: Features, rows: NDArray[np.int64], device: torch.device
) -> NDArray[np.float32]:
    tokens = []
    for start in range(0, len(rows), _BATCH_IMAGES):
        patches = torch.from_numpy(features.tokens[rows[start : start + _BATCH_IMAGES]].astype(np.float32)).to(device)
        tokens.append(model.encode_patches(patches).float().cpu().numpy())
    return np.concatenate(tokens)

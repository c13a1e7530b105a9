"""A dataset split encoded by a checkpoint, with its visual tokens stored as the service stores them.

The one module of this folder that knows checkpoints, datasets and storage; the others take arrays and callables. The
tower's features are cached on disk (`edje.features.extraction`), so a second model over the same tower costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from edje.calibration import Calibration
from edje.data.dataset import Dataset
from edje.evaluation.cost import ScorerCost
from edje.evaluation.errors import SplitUnusable
from edje.evaluation.protocol import Scorer
from edje.evaluation.scorers import CHEAP, FULL
from edje.evaluation.storage import Storage, StoredTokens, store_tokens
from edje.evaluation.torch_scorers import TorchScorers, joint_cost, late_interaction_cost
from edje.features.extraction import extract, extractor_of
from edje.features.storage import Features
from edje.first_stage.load import load_first_stage
from edje.model.edje import Edje
from edje.model.weights import load_checkpoint
from edje.text import Tokenizer

BATCH_IMAGES = 32
CHECKPOINT_FIRST_STAGE = "checkpoint"  # the first stage that the checkpoint holds


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """The inputs of scorers: captions and stored images by number, and first-stage similarities."""

    checkpoint: Path
    model_digest: str
    trained: bool
    calibration: Calibration | None
    data: str
    split: str
    captions: tuple[str, ...]
    image_ids: tuple[str, ...]
    image_of_caption: NDArray[np.int64]  # (captions,)
    group_of_image: NDArray[np.int64]  # (images,): images made to be confused with each other share a number
    first_stage: str
    similarity: NDArray[np.float32]  # (captions, images)
    stored: StoredTokens
    scorers: Mapping[str, Callable[[], Scorer]]
    costs: Mapping[str, ScorerCost]


def encode_split(
    checkpoint: Path,
    dataset: Dataset,
    split: str,
    storage: Storage,
    *,
    features: Path,
    first_stage: str = CHECKPOINT_FIRST_STAGE,
    device: str = "cpu",
    console: Console | None = None,
) -> EncodedSplit:
    """Encode and store every image, encode every caption, and compute the first-stage similarities.

    `features` is the folder of the tower's features, shared with training. `first_stage` is `checkpoint` (the first
    stage in the checkpoint), `maxsim` (the model's late interaction), or the path of a `.npy` file with (captions,
    images) similarities in the dataset's order. Progress goes to `console`. Raises `EvaluationError`,
    `CheckpointError`, `FeaturesError`, or `DataError` for the first fault of the data.
    """
    captions = tuple(caption for image in dataset.images for caption in image.captions)
    counts = [len(image.captions) for image in dataset.images]
    if not captions or 0 in counts:
        raise SplitUnusable(f"{dataset.name}, {split}: there must be an image, and every image needs a caption")
    image_of_caption = np.repeat(np.arange(len(counts)), counts)
    given = _read_similarity(Path(first_stage), (len(captions), len(counts))) if first_stage.endswith(".npy") else None
    if given is None and first_stage not in (CHECKPOINT_FIRST_STAGE, CHEAP):
        raise SplitUnusable(
            f"unknown first stage {first_stage!r}: choose {CHECKPOINT_FIRST_STAGE}, {CHEAP}, or a .npy file"
        )

    loaded = load_checkpoint(checkpoint)
    # Before the images are encoded, because the checkpoint may hold no first stage.
    stored_first_stage = load_first_stage(checkpoint) if first_stage == CHECKPOINT_FIRST_STAGE else None
    tokenizer = Tokenizer.load(checkpoint)
    model, config = loaded.model.to(device), loaded.config
    text_ids = [tokenizer.encode(caption) for caption in captions]
    extracted = extract(extractor_of(model, config), dataset, features, strict=True, console=console)
    stored = store_tokens(encode_images(model, extracted, device), storage, loaded.digest)
    torch_scorers = TorchScorers(model, text_ids, stored.tokens, device=device)
    if given is not None:
        similarity = given
    elif stored_first_stage is not None:
        texts = stored_first_stage.caption_vectors(captions, text_ids)
        similarity = texts @ stored_first_stage.image_vectors(extracted.pooled).T
    elif torch_scorers.has_late_interaction:
        similarity = torch_scorers.late_interaction_matrix()
    else:
        raise SplitUnusable(
            f"{checkpoint} has no late interaction to search with: choose {CHECKPOINT_FIRST_STAGE}, or give the "
            "similarities as a .npy file"
        )
    lengths = [len(ids) for ids in text_ids]
    num_visual = stored.tokens.shape[1]
    scorers: dict[str, Callable[[], Scorer]] = {FULL: torch_scorers.joint}
    costs = {FULL: joint_cost(config.joint, lengths, num_visual)}
    if torch_scorers.has_late_interaction:
        scorers[CHEAP] = torch_scorers.late_interaction
        costs[CHEAP] = late_interaction_cost(config.joint, lengths, num_visual)
    return EncodedSplit(
        checkpoint=checkpoint,
        model_digest=loaded.digest,
        trained=config.trained,
        calibration=config.calibration,
        data=dataset.name,
        split=split,
        captions=captions,
        image_ids=tuple(image.image_id for image in dataset.images),
        image_of_caption=image_of_caption,
        group_of_image=_groups(dataset),
        first_stage=first_stage,
        similarity=similarity,
        stored=stored,
        scorers=scorers,
        costs=costs,
    )


def _groups(dataset: Dataset) -> NDArray[np.int64]:
    """(images,) a number for each image's group; an image without a group is a group of one."""
    numbers: dict[str | int, int] = {}
    names = [number if image.group is None else image.group for number, image in enumerate(dataset.images)]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


@torch.inference_mode()
def encode_images(model: Edje, extracted: Features, device: str) -> NDArray[np.float32]:
    """(images, m, d) visual tokens of every image, in the dataset's order."""
    tokens: list[NDArray[np.float32]] = []
    for start in range(0, len(extracted.tokens), BATCH_IMAGES):
        patches = torch.from_numpy(extracted.tokens[start : start + BATCH_IMAGES].astype(np.float32))
        tokens.append(model.encode_patches(patches.to(device)).float().cpu().numpy())
    return np.concatenate(tokens)


def _read_similarity(path: Path, expected: tuple[int, int]) -> NDArray[np.float32]:
    try:
        similarity = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SplitUnusable(f"the similarities in {path} cannot be read: {error}") from error
    if not isinstance(similarity, np.ndarray) or similarity.shape != expected:
        raise SplitUnusable(
            f"{path} holds similarities of shape {getattr(similarity, 'shape', 'unknown')}; "
            f"these data have {expected[0]:,} captions and {expected[1]:,} images"
        )
    return similarity.astype(np.float32)

"""Ranks candidate lists with a checkpoint: encodes their images and texts and orders each list as the service would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from edje.calibration import log_odds
from edje.data.candidate_lists import CandidateList
from edje.data.image_files import DatasetBuilder
from edje.evaluation.encoded_split import encode_images
from edje.evaluation.storage import Storage, store_tokens
from edje.evaluation.torch_scorers import TorchScorers
from edje.features.extraction import extract, extractor_of
from edje.first_stage_scores import standardise
from edje.model.weights import Checkpoint
from edje.text import Tokenizer


def rank_lists(
    checkpoint: Path,
    loaded: Checkpoint,
    lists: Sequence[CandidateList],
    image_root: Path,
    storage: Storage,
    *,
    features: Path,
    device: str = "cpu",
    console: Console | None = None,
) -> list[NDArray[np.int64]]:
    """The positions of each list's candidates, best first. Names of images are file names below `image_root`.

    Raises `DataError` for an image that is missing or cannot be decoded, `EvaluationError`, `FeaturesError`.
    """
    images: dict[str, int] = {}
    texts: dict[str, int] = {}
    pairs = []
    for one in lists:
        contents = [candidate.content for candidate in one.candidates]
        asks_text = one.direction == "text-to-image"
        named, written = (contents, [one.query]) if asks_text else ([one.query], contents)
        image_numbers = [images.setdefault(name, len(images)) for name in named]
        text_numbers = [texts.setdefault(text, len(texts)) for text in written]
        pairs.append(np.broadcast_arrays(np.array(text_numbers), np.array(image_numbers)))
    builder = DatasetBuilder("the candidate lists", image_root)
    for name in images:
        if builder.add_image(name, name):
            builder.add_caption(name, "image")  # a dataset's images need a caption; this one is not read
    dataset = builder.finish(strict=True)
    model = loaded.model.to(device)
    extracted = extract(extractor_of(model, loaded.config), dataset, features, strict=True, console=console)
    stored = store_tokens(encode_images(model, extracted, device), storage, loaded.digest)
    tokenizer = Tokenizer.load(checkpoint)
    scorer = TorchScorers(model, [tokenizer.encode(text) for text in texts], stored.tokens, device=device).joint()
    logits = scorer(*(np.concatenate(part).astype(np.int64) for part in zip(*pairs, strict=True)))
    ends = np.cumsum([len(one.candidates) for one in lists])
    calibration = loaded.config.calibration
    orders = []
    for one, part in zip(lists, np.split(logits, ends[:-1]), strict=True):
        first_stage = standardise([candidate.score for candidate in one.candidates]).values
        odds = log_odds(part, first_stage, None if calibration is None else calibration.of(one.direction))
        orders.append(np.argsort(-odds, kind="stable"))
    return orders

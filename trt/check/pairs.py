"""Pairs that engines are compared on: pictures and texts of every length that no training saw.

Drawn scenes where the tokenizer knows their words, since ranks mean something there; random ones elsewhere, told apart
in the report. Knows the engines' contract, and no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edje.config import EdjeConfig
from edje.data.scenes.dataset import holdout
from edje.text import Tokenizer
from protocols.quantize import quantize
from trt.contract import Engine
from trt.parity import ParityFailed

_SEED = 20_260
#: Every so many pairs the first stage gave nothing.
_MISSING = 7
_UNKNOWN = "[UNK]"


@dataclass(frozen=True, slots=True)
class HeldPairs:
    """Every text with every picture."""

    said: str  # what they are, in words
    pixels: NDArray[np.uint8]  # (N, 3, S, S)
    texts: tuple[tuple[int, ...], ...]  # Q
    first_stage: NDArray[np.float32]  # (Q, N), read by models that read it


def hold_pairs(config: EdjeConfig, tokenizer: Tokenizer | None, num_texts: int, num_images: int) -> HeldPairs:
    """The same pairs for the same arguments. Without a tokenizer, texts are random numbers."""
    random = np.random.default_rng(_SEED)
    first = config.joint.first_stage
    mean, std = (0.0, 1.0) if first is None else (first.mean, first.std)
    first_stage = random.normal(mean, std, (num_texts, num_images)).astype(np.float32)
    first_stage.reshape(-1)[::_MISSING] = np.nan
    scenes = None if tokenizer is None else _scenes(config, tokenizer, num_texts, num_images)
    if scenes is None:
        pixels, texts = _random(config, random, num_texts, num_images)
        return HeldPairs("random pictures and texts", pixels, texts, first_stage)
    return HeldPairs("drawn scenes, captions and captions in a row", *scenes, first_stage)


def logits_of(engine: Engine, held: HeldPairs, advance: Callable[[int], None] = lambda _: None) -> NDArray[np.float32]:
    """Store the pictures as an engine encodes them and score every pair: (Q, N).

    `advance` is told of pairs as they are done. The engine needs a slot for every picture. Raises `ParityFailed` for
    visual tokens that cannot be stored.
    """
    num_texts, num_images = len(held.texts), len(held.pixels)
    for start in range(0, num_images, engine.info.max_images):
        tokens, _ = engine.encode_images(held.pixels[start : start + engine.info.max_images])
        _store(engine, start, tokens)
    queries = engine.encode_queries(held.texts)
    pair_query, pair_slot = np.divmod(np.arange(num_texts * num_images, dtype=np.int32), np.int32(num_images))
    given = held.first_stage.reshape(-1)
    logits = np.empty(num_texts * num_images, np.float32)
    for start in range(0, len(logits), engine.info.max_pairs):
        part = slice(start, start + engine.info.max_pairs)
        logits[part] = engine.score_pairs(queries, pair_query[part], pair_slot[part], given[part])
        advance(len(logits[part]))
    return logits.reshape(num_texts, num_images)


def _store(engine: Engine, start: int, tokens: NDArray[np.float32]) -> None:
    slots = range(start, start + len(tokens))
    to_tokens, to_scales, rows = engine.slab.stage(slots)
    for slot, row, image in zip(slots, rows, tokens, strict=True):
        try:
            values, scales = quantize(engine.info.storage, image)  # type: ignore[arg-type]
        except ValueError as error:
            raise ParityFailed(f"the {engine.info.runtime} engine's tokens of picture {slot}: {error}") from error
        to_tokens[row], to_scales[row] = np.frombuffer(values, np.uint8), np.frombuffer(scales, np.uint8)
    engine.slab.publish(slots, rows)


def _scenes(
    config: EdjeConfig, tokenizer: Tokenizer, num_texts: int, num_images: int
) -> tuple[NDArray[np.uint8], tuple[tuple[int, ...], ...]] | None:
    """Pictures and texts; None where the tokenizer has no words for them."""
    data = holdout(num_images, seed=_SEED)
    captions = [caption for image in data.images for caption in image.captions]
    encoded = [tokenizer.encode(caption) for caption in captions]
    unknown = tokenizer.token_id(_UNKNOWN)
    if any(unknown in ids for ids in encoded):
        return None
    pixels = np.stack([data.pixels(number, config.preprocess.image_size) for number in range(num_images)])
    # Every other text is a caption as it is; the rest fill every length, which captions of one kind do not.
    lengths = _lengths(config, num_texts // 2)
    texts = [tuple(encoded[number * len(encoded) // num_texts]) for number in range(num_texts - len(lengths))]
    for number, length in enumerate(lengths):
        start = number * len(captions) // num_texts
        row = tokenizer.encode(" ".join(captions[start:] + captions[:start]))
        texts.append((*row[: length - 1], row[-1]))
    return pixels, tuple(texts)


def _random(
    config: EdjeConfig, random: np.random.Generator, num_texts: int, num_images: int
) -> tuple[NDArray[np.uint8], tuple[tuple[int, ...], ...]]:
    """Smooth pictures, because noise looks the same to a pooling head."""
    side = config.preprocess.image_size
    coarse = random.integers(0, 256, (num_images, 3, 4, 4), dtype=np.uint8)
    step = -(-side // 4)
    pixels = coarse.repeat(step, axis=2).repeat(step, axis=3)[:, :, :side, :side]
    texts = (random.integers(0, config.joint.vocab_size, length) for length in _lengths(config, num_texts))
    return np.ascontiguousarray(pixels), tuple(tuple(text.tolist()) for text in texts)


def _lengths(config: EdjeConfig, number: int) -> list[int]:
    """So many lengths from the shortest text, [CLS] and [SEP], to the longest."""
    return [round(length) for length in np.linspace(2, config.preprocess.max_text_tokens, number)]

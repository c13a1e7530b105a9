"""The pairs on which engines are compared: images and texts that no training used.

The user's photographs if a folder is given; else drawn scenes if the tokenizer knows the words of their captions,
because their ranks are meaningful; else random images and texts. The report names the kind. Knows the contract of
engines, and no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edje.config import EdjeConfig
from edje.data.scenes.dataset import holdout
from edje.images import ImageError, ImageLimits, decode_image
from edje.text import Tokenizer
from protocols.quantize import quantize
from trt.contract import Engine, EngineUnavailable
from trt.parity import ParityFailed

_SEED = 20_260
_UNKNOWN = "[UNK]"
_LIMITS = ImageLimits(max_bytes=64_000_000, max_pixels=100_000_000)
_MIN_PHOTOGRAPHS = 2


@dataclass(frozen=True, slots=True)
class ParityPairs:
    """Images and texts; every text is paired with every image."""

    summary: str  # kind of the pairs, for the report
    pixels: NDArray[np.uint8]  # (N, 3, S, S)
    texts: tuple[tuple[int, ...], ...]  # Q


def parity_pairs(
    config: EdjeConfig, tokenizer: Tokenizer | None, num_texts: int, num_images: int, folder: Path | None = None
) -> ParityPairs:
    """Return the pairs, always the same for the same arguments. Without a tokenizer, texts are random token ids.

    `folder` holds photographs to use instead, in the order of their names; `captions.txt` in it has a caption per
    line. Raises `EngineUnavailable` for a folder with fewer than two images that can be decoded.
    """
    photographs = None if folder is None else _photographs(config, folder, num_images)
    if photographs is not None:
        num_images = len(photographs)
    random = np.random.default_rng(_SEED)
    if photographs is not None and folder is not None:
        captions = _captions(config, tokenizer, folder, num_texts) or _random(config, random, num_texts, num_images)[1]
        return ParityPairs(f"{num_images} photographs of {folder}", photographs, captions)
    scenes = None if tokenizer is None else _scenes(config, tokenizer, num_texts, num_images)
    if scenes is None:
        pixels, texts = _random(config, random, num_texts, num_images)
        return ParityPairs("random pictures and texts", pixels, texts)
    return ParityPairs("drawn scenes, captions and captions in a row", *scenes)


def logits_of(
    engine: Engine, pairs: ParityPairs, advance: Callable[[int], None] = lambda _: None
) -> NDArray[np.float32]:
    """Encode the images with an engine, fill its slab, and return the logits of all pairs, (Q, N).

    `advance` is called with the number of pairs after each batch. The engine needs a slot for every image. Raises
    `ParityFailed` for visual tokens that cannot be stored.
    """
    num_texts, num_images = len(pairs.texts), len(pairs.pixels)
    for start in range(0, num_images, engine.info.max_images):
        tokens, _ = engine.encode_images(pairs.pixels[start : start + engine.info.max_images])
        _store(engine, start, tokens)
    queries = engine.encode_queries(pairs.texts)
    pair_query, pair_slot = np.divmod(np.arange(num_texts * num_images, dtype=np.int32), np.int32(num_images))
    logits = np.empty(num_texts * num_images, np.float32)
    for start in range(0, len(logits), engine.info.max_pairs):
        part = slice(start, start + engine.info.max_pairs)
        logits[part] = engine.score_pairs(queries, pair_query[part], pair_slot[part])
        advance(len(logits[part]))
    return logits.reshape(num_texts, num_images)


def _store(engine: Engine, start: int, tokens: NDArray[np.float32]) -> None:
    slots = range(start, start + len(tokens))
    to_tokens, to_scales, rows = engine.slab.stage(slots)
    for slot, row, image in zip(slots, rows, tokens, strict=True):
        try:
            values, scales = quantize(engine.info.storage, image)  # type: ignore[arg-type]
        except ValueError as error:
            raise ParityFailed(f"the {engine.info.runtime} engine's tokens of image {slot}: {error}") from error
        to_tokens[row], to_scales[row] = np.frombuffer(values, np.uint8), np.frombuffer(scales, np.uint8)
    engine.slab.publish(slots, rows)


def _photographs(config: EdjeConfig, folder: Path, num_images: int) -> NDArray[np.uint8]:
    """The first images of a folder that can be decoded: (n, 3, S, S)."""
    found: list[NDArray[np.uint8]] = []
    preprocess = config.preprocess
    for path in sorted(each for each in folder.glob("*") if each.is_file()):
        if len(found) == num_images:
            break
        if path.stat().st_size <= _LIMITS.max_bytes:
            with suppress(ImageError, OSError):
                found.append(decode_image(path.read_bytes(), preprocess.image_size, _LIMITS, preprocess.resample))
    if len(found) < _MIN_PHOTOGRAPHS:
        raise EngineUnavailable(
            f"{folder} holds {len(found)} images that can be decoded, and {_MIN_PHOTOGRAPHS} are needed: name a folder "
            "of photographs"
        )
    return np.stack(found)


def _captions(
    config: EdjeConfig, tokenizer: Tokenizer | None, folder: Path, num_texts: int
) -> tuple[tuple[int, ...], ...]:
    """The ids of the first lines of a folder's `captions.txt`; empty without the file or a tokenizer."""
    path = folder / "captions.txt"
    if tokenizer is None or not path.is_file():
        return ()
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in islice(file, num_texts)]
    encoded = [tokenizer.encode(line) for line in lines if line]
    return tuple(tuple(ids) for ids in encoded if 0 < len(ids) <= config.preprocess.max_text_tokens)


def _scenes(
    config: EdjeConfig, tokenizer: Tokenizer, num_texts: int, num_images: int
) -> tuple[NDArray[np.uint8], tuple[tuple[int, ...], ...]] | None:
    """Return images and texts; None if a caption has a word that the tokenizer does not know."""
    data = holdout(num_images, seed=_SEED)
    captions = [caption for image in data.images for caption in image.captions]
    encoded = [tokenizer.encode(caption) for caption in captions]
    unknown = tokenizer.token_id(_UNKNOWN)
    if any(unknown in ids for ids in encoded):
        return None
    pixels = np.stack([data.pixels(number, config.preprocess.image_size) for number in range(num_images)])
    # Half of the texts are unchanged captions. The rest cover all lengths: captions alone are of similar length.
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
    """Return random images and texts. The images are smooth, because a pooling head maps all noise to equal tokens."""
    side = config.preprocess.image_size
    coarse = random.integers(0, 256, (num_images, 3, 4, 4), dtype=np.uint8)
    step = -(-side // 4)
    pixels = coarse.repeat(step, axis=2).repeat(step, axis=3)[:, :, :side, :side]
    texts = (random.integers(0, config.joint.vocab_size, length) for length in _lengths(config, num_texts))
    return np.ascontiguousarray(pixels), tuple(tuple(text.tolist()) for text in texts)


def _lengths(config: EdjeConfig, number: int) -> list[int]:
    """Return `number` evenly spaced lengths, from the empty text ([CLS] and [SEP]) to the longest."""
    return [round(length) for length in np.linspace(2, config.preprocess.max_text_tokens, number)]

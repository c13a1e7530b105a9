"""The checkpoint's first stage as a vector search: texts and images as vectors, compared by cosine.

The images' vectors come from the embeddings in `images.indexed`, as a search team would fill its
index. Imports torch, so import it only where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from demo_first_stage import Found, best_of
from edje.first_stage.base import FirstStageEncoder as Embedder
from edje.first_stage.load import load_first_stage
from edje.images import ImageLimits, decode_image
from edje.model.weights import load_checkpoint
from edje.text import Tokenizer

#: The ingest worker's own, by default: it has taken these pictures already.
LIMITS = ImageLimits(max_bytes=32 << 20, max_pixels=50_000_000)


class VectorIndex:
    """An index over the vectors of all images. Implements the demo's `FirstStage`."""

    means = "the cosine of two vectors"

    def __init__(self, embedder: Embedder, tokenizer: Tokenizer, pooled: Mapping[str, Sequence[float]]) -> None:
        """`pooled` is the tower's embedding of each image, by its id."""
        self._embedder = embedder
        self._tokenizer = tokenizer
        self._row = {image_id: row for row, image_id in enumerate(pooled)}
        self._images = embedder.image_vectors(np.array(list(pooled.values()), np.float32))

    @classmethod
    def load(cls, checkpoint: Path, pooled: Mapping[str, Sequence[float]]) -> VectorIndex:
        """Load a checkpoint's first stage over these images. Raises `CheckpointError`."""
        return cls(load_first_stage(checkpoint), Tokenizer.load(checkpoint), pooled)

    def images(self, text: str, top_n: int) -> Found:
        cosines = self._images @ self._texts([text])[0]
        return best_of(dict(zip(self._row, cosines.tolist(), strict=True)), top_n)

    def texts(self, image_id: str, texts: Mapping[str, str], top_n: int) -> Found:
        cosines = self._texts(list(texts.values())) @ self._images[self._row[image_id]]
        return best_of(dict(zip(texts, cosines.tolist(), strict=True)), top_n)

    def _texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._embedder.caption_vectors(texts, [self._tokenizer.encode(text) for text in texts])


@torch.inference_mode()
def pooled_here(checkpoint: Path, paths: Mapping[str, Path]) -> dict[str, list[float]]:
    """Return the tower's embeddings, computed in this process. Raises `CheckpointError`."""
    loaded = load_checkpoint(checkpoint)
    preprocess = loaded.config.preprocess
    found = {}
    for image_id, path in paths.items():
        pixels = decode_image(path.read_bytes(), preprocess.image_size, LIMITS, preprocess.resample)
        found[image_id] = loaded.model.run_tower(torch.from_numpy(pixels)[None])[1][0].tolist()
    return found

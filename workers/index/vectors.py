"""Converts pooled embeddings and texts to vectors compared by cosine, with a checkpoint's first stage.

Imports torch only when a first stage is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edje.checkpoint import CheckpointError, read_config, read_digest
from edje.text import Tokenizer
from workers.errors import Misconfigured
from workers.index.port import Vector

if TYPE_CHECKING:
    from edje.first_stage.base import FirstStageEncoder


class VectorModel:
    """The first stage of one model."""

    def __init__(
        self, model_digest: str, pooled_dim: int, first_stage: FirstStageEncoder, tokenizer: Tokenizer
    ) -> None:
        """`pooled_dim` is the width of the vision tower's pooled embedding."""
        self.model_digest = model_digest
        self.pooled_dim = pooled_dim
        self._first_stage = first_stage
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, checkpoint: Path) -> VectorModel:
        """Load a checkpoint's first stage on the CPU. Raises `Misconfigured`."""
        from edje.first_stage.load import load_first_stage

        try:
            config = read_config(checkpoint)
            return cls(
                read_digest(checkpoint),
                config.vision.pooled_dim,
                load_first_stage(checkpoint),
                Tokenizer.load(checkpoint),
            )
        except CheckpointError as error:
            raise Misconfigured(str(error)) from error

    @property
    def dim(self) -> int:
        """The width of the vectors."""
        return self._first_stage.dim

    def of_images(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (N, e) vectors of (N, E) pooled embeddings."""
        return self._first_stage.image_vectors(pooled)

    def of_text(self, text: str) -> Vector:
        """Return the vector of a query, (e,)."""
        vector: Vector = self._first_stage.caption_vectors([text], [self._tokenizer.encode(text)])[0]
        return vector

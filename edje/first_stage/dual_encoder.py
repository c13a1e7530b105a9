"""A local first stage: texts and images as single vectors, compared by their cosine.

For collections without CLIP, SigLIP or a vector database. An image's vector is a linear map of the tower's pooled
embedding. A text's vector is a weighted sum of word vectors (`num_layers` 0, fitted in closed form by
`edje.first_stage.cca`) or the mean of a small text encoder's tokens. Only the text encoder distinguishes two texts with
the same words in another order, and no single vector captures well which attribute belongs to which object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from edje.config import JointConfig
from edje.first_stage.base import FirstStageEncoder, Vectors, load_weights, parse_config, write_folder
from edje.layers import empty_embedding
from edje.model.joint import JointBlock, attention_mask
from edje.tower_config import Count

#: Factor on the cosine at the start of training, as in CLIP.
INITIAL_SCALE = 14.3
#: Captions or images that are embedded at a time.
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class DualEncoderConfig:
    """`dim` is the width of the vectors, `text_dim` the width of the words, `image_dim` of the pooled embeddings.

    `image_power` raises the pooled embedding's absolute values to this power: below 1 it reduces the large values of a
    tower that ends in a ReLU.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    dim: Count
    vocab_size: Count
    image_dim: Count
    text_dim: Count
    num_layers: Annotated[int, Field(ge=0)] = 0
    num_heads: Count = 4
    max_positions: Count = 64
    image_power: Annotated[float, Field(gt=0)] = 1.0

    def __post_init__(self) -> None:
        if self.text_dim % self.num_heads:
            raise ValueError(f"text_dim {self.text_dim} is no multiple of num_heads {self.num_heads}")


class DualEncoder(FirstStageEncoder):
    """Text encoder and image map."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.words = empty_embedding(config.vocab_size, config.text_dim)
        self.word_weights = nn.Parameter(torch.ones(config.vocab_size), requires_grad=config.num_layers > 0)
        self.positions = empty_embedding(config.max_positions, config.text_dim) if config.num_layers else None
        blocks = JointConfig(
            dim=config.text_dim,
            num_layers=max(1, config.num_layers),
            num_heads=config.num_heads,
            hidden_dim=4 * config.text_dim,
            vocab_size=config.vocab_size,
            sep_id=0,
        )
        self.layers = nn.ModuleList(JointBlock(blocks) for _ in range(config.num_layers))
        self.text_out = nn.Linear(config.text_dim, config.dim)
        self.image_out = nn.Linear(config.image_dim, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    @property
    def dim(self) -> int:
        return self.config.dim

    @torch.inference_mode()
    def caption_vectors(self, captions: Sequence[str], text_ids: Sequence[Sequence[int]]) -> Vectors:
        """See `FirstStageEncoder`; reads the ids."""
        vectors = np.empty((len(text_ids), self.dim), np.float32)
        device = self.image_out.weight.device
        lengths = torch.tensor([len(ids) for ids in text_ids])
        by_length = lengths.argsort(stable=True)
        for start in range(0, len(text_ids), _CHUNK):
            chunk = by_length[start : start + _CHUNK]
            padded = torch.zeros(len(chunk), int(lengths[chunk].max()), dtype=torch.long)
            for row, caption in zip(padded, chunk.tolist(), strict=True):
                row[: lengths[caption]] = torch.tensor(text_ids[caption])
            embedded = self.embed_texts(padded.to(device), lengths[chunk].to(device))
            vectors[chunk.numpy()] = embedded.float().cpu()
        return vectors

    @torch.inference_mode()
    def image_vectors(self, pooled: NDArray[np.floating]) -> Vectors:
        """See `FirstStageEncoder`."""
        vectors = np.empty((len(pooled), self.dim), np.float32)
        for start in range(0, len(pooled), _CHUNK):
            chunk = torch.from_numpy(np.array(pooled[start : start + _CHUNK], np.float32))
            vectors[start : start + _CHUNK] = self.embed_images(chunk.to(self.image_out.weight.device)).float().cpu()
        return vectors

    def save(self, folder: Path) -> None:
        """See `FirstStageEncoder`."""
        write_folder(folder, {"kind": "own", "config": asdict(self.config)}, self.state_dict())

    def embed_texts(self, text_ids: Tensor, text_lengths: Tensor) -> Tensor:  # (Q, T), (Q,) -> (Q, e)
        """Vectors of captions with [CLS] and [SEP]; any token may pad them on the right."""
        num_text = text_ids.shape[1]
        is_text = torch.arange(num_text, device=text_ids.device) < text_lengths[:, None]
        if self.positions is None:
            return functional.normalize(self.text_out(self._word_sum(text_ids, is_text)), dim=-1)
        mask = attention_mask(text_lengths, num_text, 0)
        hidden = self.words(text_ids) + self.positions.weight[:num_text]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        mean = (hidden * is_text[..., None]).sum(dim=1) / text_lengths[:, None]
        return functional.normalize(self.text_out(mean), dim=-1)

    def embed_images(self, pooled: Tensor) -> Tensor:  # (N, E) -> (N, e)
        power = self.config.image_power
        scaled = pooled if power == 1.0 else pooled.sign() * pooled.abs() ** power
        return functional.normalize(self.image_out(scaled.to(self.image_out.weight.dtype)), dim=-1)

    def _word_sum(self, text_ids: Tensor, is_text: Tensor) -> Tensor:
        """Weighted sum of the vectors of each text's distinct words, (Q, T) -> (Q, d); the weights have unit length."""
        ordered, _ = text_ids.masked_fill(~is_text, -1).sort(dim=1)
        is_new = functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True) & (ordered >= 0)
        weights = self.word_weights[ordered.clamp(min=0)] * is_new
        weights = functional.normalize(weights, dim=1)
        summed: Tensor = (weights[..., None] * self.words(ordered.clamp(min=0))).sum(dim=1)
        return summed


def load_dual_encoder(folder: Path, fields: dict[str, Any], data: bytes) -> DualEncoder:
    """The encoder that `DualEncoder.save` wrote. Raises `CheckpointError`."""
    config = parse_config(folder, DualEncoderConfig, fields.get("config"))
    with torch.device("meta"):
        encoder = DualEncoder(config)
    return load_weights(folder, encoder, data)

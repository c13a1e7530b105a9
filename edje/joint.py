"""The joint encoder: reads a caption and an image's visual tokens together and gives one logit.

BERT's layout over `[CLS] caption [SEP] v_1 ... v_m [SEP]`. What depends on the text alone (`embed_queries`) is apart
from what depends on the pair (`score`), so a query is embedded once for all its candidates.
Embeddings and head compute in their own precision, the layers in theirs: `layers` may be turned to bf16 alone.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from edje.config import JointConfig
from edje.layers import Attention, Mlp

_TEXT, _IMAGE = 0, 1  # token types; the last [SEP] counts as image


class JointBlock(nn.Module):
    """A layer that normalises after it has mixed."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.attention = Attention(config.dim, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.hidden_dim)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:  # (B, S, d), (B, 1, 1, S) -> (B, S, d)
        return self._finish(hidden, self.attention(hidden, mask))

    def first(self, hidden: Tensor, mask: Tensor | None) -> Tensor:  # (B, S, d), (B, 1, 1, S) -> (B, 1, d)
        """What `forward` gives for [CLS]; nobody reads the other tokens of the last layer."""
        return self._finish(hidden[:, :1], self.attention.first(hidden, mask))

    def _finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = self.attention_norm(hidden + mixed)
        return self.mlp_norm(hidden + self.mlp(hidden))  # type: ignore[no-any-return]


class JointEncoder(nn.Module):
    """Embeddings, layers, pooler and the matching head."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.sep_id = config.sep_id
        self.words = _table(config.vocab_size, config.dim)
        self.positions = _table(config.max_positions, config.dim)
        self.types = _table(2, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.layers = nn.ModuleList(JointBlock(config) for _ in range(config.num_layers))
        self.pooler = nn.Linear(config.dim, config.dim)
        self.head = nn.Linear(config.dim, 1)

    def embed_queries(self, text_ids: Tensor) -> Tensor:  # (Q, T) -> (Q, T, d)
        """Captions with their [CLS] and [SEP], padded on the right with any token: `score` masks the padding."""
        positions = self.positions.weight[: text_ids.shape[1]]
        return self.norm(self.words(text_ids) + positions + self.types.weight[_TEXT])  # type: ignore[no-any-return]

    def score(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """(B, T, d) embedded captions, (B, m, d) visual tokens -> (B,) logits.

        `text_lengths` (B,) says how much of each caption is not padding; None means that none of it is.
        """
        images = self._embed_images(visual, text.shape[1], text_lengths)
        mask = None if text_lengths is None else self._mask(text, images, text_lengths)
        *layers, last = (cast(JointBlock, layer) for layer in self.layers)
        hidden = torch.cat((text, images), dim=1).to(last.mlp.fc1.weight.dtype)
        for layer in layers:
            hidden = layer(hidden, mask)
        first = last.first(hidden, mask)[:, 0].to(self.pooler.weight.dtype)
        return self.head(torch.tanh(self.pooler(first)))[:, 0]  # type: ignore[no-any-return]

    def _embed_images(self, visual: Tensor, num_text: int, text_lengths: Tensor | None) -> Tensor:
        """Visual tokens and the last [SEP] at the positions that follow the caption: (B, m + 1, d)."""
        after = visual.shape[1] + 1
        if text_lengths is None:
            positions = self.positions.weight[num_text : num_text + after]
        else:
            positions = self.positions(text_lengths[:, None] + torch.arange(after, device=visual.device))
        last = self.words.weight[self.sep_id].expand(visual.shape[0], 1, -1)
        words = torch.cat((visual.to(last.dtype), last), dim=1)
        return self.norm(words + positions + self.types.weight[_IMAGE])  # type: ignore[no-any-return]

    @staticmethod
    def _mask(text: Tensor, images: Tensor, text_lengths: Tensor) -> Tensor:
        """True where a token may be looked at: (B, 1, 1, S)."""
        is_text = torch.arange(text.shape[1], device=text.device) < text_lengths[:, None]
        is_image = torch.ones(images.shape[:2], dtype=torch.bool, device=text.device)
        return torch.cat((is_text, is_image), dim=1)[:, None, None, :]


def joint_flops(config: JointConfig, num_text: int, num_visual: int, *, cls_only_last_layer: bool = False) -> int:
    """Floating-point operations of the layers for one pair; `num_text` counts the caption's [CLS] and [SEP].

    Two per multiply-add, matrix products only: norms, GELU and softmax add under one percent.
    """
    sequence = num_text + num_visual + 1
    d, f = config.dim, config.hidden_dim
    layer = 2 * (4 * d * d + 2 * d * f) * sequence + 4 * d * sequence * sequence
    if not cls_only_last_layer:
        return config.num_layers * layer
    keys_and_values = 2 * 2 * d * d * sequence
    for_cls = 2 * (2 * d * d + 2 * d * f) + 4 * d * sequence
    return (config.num_layers - 1) * layer + keys_and_values + for_cls


def _table(num_rows: int, dim: int) -> nn.Embedding:
    """An embedding with its memory and no values yet: torch's own initialisation, which is thrown away here, imports
    its compiler when the module is built on the meta device, and that takes seconds."""
    return nn.Embedding(num_rows, dim, _weight=torch.empty(num_rows, dim))

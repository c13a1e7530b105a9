"""The joint encoder: reads a caption and an image's visual tokens together and gives one logit.

BERT's layout over `[CLS] caption [SEP] v_1 ... v_m [SEP]`. What depends on the text alone (`encode_queries`) is apart
from what depends on the pair (`score`), so a query is embedded once for all its candidates.
Embeddings and head compute in their own precision, the layers in theirs: `layers` may be turned to bf16 alone.
`edje.model.late_fusion` has the encoders in which text and image meet later; `build_joint` picks.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from edje.config import JointConfig
from edje.layers import Attention, KeysValues, Mlp, table
from edje.model.head import FirstStageInput, MatchingHead

TEXT, IMAGE = 0, 1  # token types; the last [SEP] counts as image


class JointBlock(nn.Module):
    """A layer that normalises after it has mixed."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.attention = Attention(config.dim, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.hidden_dim)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None, beside: KeysValues | None = None) -> Tensor:
        """(B, S, d), (B, 1, 1, S) -> (B, S, d)"""
        return self._finish(hidden, self.attention(hidden, mask, beside))

    def first(self, hidden: Tensor, mask: Tensor | None, beside: KeysValues | None = None) -> Tensor:
        """What `forward` gives for [CLS], (B, 1, d): nobody reads the other tokens of the last layer."""
        return self._finish(hidden[:, :1], self.attention.first(hidden, mask, beside))

    def _finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = self.attention_norm(hidden + mixed)
        return self.mlp_norm(hidden + self.mlp(hidden))  # type: ignore[no-any-return]


class TextEmbeddings(nn.Module):
    """Words, positions and types of BERT, and the norm over their sum."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.words = table(config.vocab_size, config.dim)
        self.positions = table(config.max_positions, config.dim)
        self.types = table(2, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def embed_text(self, text_ids: Tensor) -> Tensor:  # (Q, T) -> (Q, T, d)
        positions = self.positions.weight[: text_ids.shape[1]]
        return self.norm(self.words(text_ids) + positions + self.types.weight[TEXT])  # type: ignore[no-any-return]


class JointEncoder(TextEmbeddings):
    """Embeddings, layers over both sequences at once, and the matching head."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__(config)
        self.sep_id = config.sep_id
        self.layers = nn.ModuleList(JointBlock(config) for _ in range(config.num_layers))
        self.head = MatchingHead(config)

    @property
    def score_input(self) -> FirstStageInput | None:
        """Where the first stage's score comes in, if this encoder reads it."""
        return self.head.first_stage

    def encode_visual(self, visual: Tensor) -> Tensor:  # (B, m, d) -> (B, m, d)
        """What is stored of an image: the adapter's tokens as they are."""
        return visual

    def encode_queries(self, text_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:  # (Q, T) -> (Q, T, d)
        """Captions with their [CLS] and [SEP], padded on the right with any token: `score` masks the padding."""
        return self.embed_text(text_ids)

    def score(
        self,
        text: Tensor,
        visual: Tensor,
        text_lengths: Tensor | None = None,
        first_stage: Tensor | None = None,
    ) -> Tensor:
        """(B, T, d) encoded captions, (B, m, d) stored tokens -> (B,) logits.

        `text_lengths` (B,) says how much of each caption is not padding; None means that none of it is.
        `first_stage` (B,) is what the first stage gave, for a head that reads it; NaN where it gave nothing.
        """
        hidden, mask = self._join(text, visual, text_lengths)
        *layers, last = (cast(JointBlock, layer) for layer in self.layers)
        for layer in layers:
            hidden = layer(hidden, mask)
        return self.head(last.first(hidden, mask)[:, 0], first_stage)  # type: ignore[no-any-return]

    def read(self, text: Tensor, visual: Tensor | None, text_lengths: Tensor | None = None) -> Tensor:
        """The caption's tokens after the last layer, (B, T, d): read with the image, or (None) without one."""
        return self.read_by_layer(text, visual, text_lengths)[-1]

    def read_by_layer(self, text: Tensor, visual: Tensor | None, text_lengths: Tensor | None = None) -> list[Tensor]:
        """The same after each layer."""
        hidden, mask = self._join(text, visual, text_lengths)
        after = []
        for layer in self.layers:
            hidden = layer(hidden, mask)
            after.append(hidden[:, : text.shape[1]])
        return after

    def _join(self, text: Tensor, visual: Tensor | None, text_lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both sequences as one (B, S, d) in the layers' precision, and what of it may be looked at (B, 1, 1, S)."""
        images = None if visual is None else self._embed_images(visual, text.shape[1], text_lengths)
        num_images = 0 if images is None else images.shape[1]
        mask = None if text_lengths is None else visible(text_lengths, text.shape[1], num_images)
        hidden = text if images is None else torch.cat((text, images), dim=1)
        return hidden.to(compute_dtype(self.layers)), mask

    def _embed_images(self, visual: Tensor, num_text: int, text_lengths: Tensor | None) -> Tensor:
        """Visual tokens and the last [SEP] at the positions that follow the caption: (B, m + 1, d)."""
        after = visual.shape[1] + 1
        if text_lengths is None:
            positions = self.positions.weight[num_text : num_text + after]
        else:
            positions = self.positions(text_lengths[:, None] + torch.arange(after, device=visual.device))
        last = self.words.weight[self.sep_id].expand(visual.shape[0], 1, -1)
        words = torch.cat((visual.to(last.dtype), last), dim=1)
        return self.norm(words + positions + self.types.weight[IMAGE])  # type: ignore[no-any-return]


def visible(text_lengths: Tensor, num_text: int, num_images: int) -> Tensor:
    """True where a token may be looked at, padding of the text aside: (B, 1, 1, num_text + num_images)."""
    is_text = torch.arange(num_text, device=text_lengths.device) < text_lengths[:, None]
    is_image = is_text.new_ones((text_lengths.shape[0], num_images))
    return torch.cat((is_text, is_image), dim=1)[:, None, None, :]


def compute_dtype(layers: nn.ModuleList) -> torch.dtype:
    """What the layers compute in."""
    return next(layers.parameters()).dtype

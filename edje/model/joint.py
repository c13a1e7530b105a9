"""The paper's joint encoder: reads a caption and an image's visual tokens together and returns one logit.

BERT's layout over `[CLS] caption [SEP] v_1 ... v_m [SEP]`. `encode_queries` computes the part that depends on the text
alone, once for all candidates of a query; `score` computes the rest. Embeddings and head compute in their weights'
precision and the layers in theirs, so that `layers` alone can be bfloat16. The encoders that fuse text and image later
are in `edje.model.late_fusion`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from edje.config import JointConfig
from edje.layers import KeysValues, Mlp, SelfAttention, empty_embedding
from edje.model.head import MatchingHead

TEXT, IMAGE = 0, 1  # token types; the last [SEP] has type IMAGE


class JointBlock(nn.Module):
    """A post-norm transformer layer."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.dim, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.hidden_dim)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None, extra_kv: KeysValues | None = None) -> Tensor:
        """(B, S, d) -> (B, S, d); see `SelfAttention` for the mask and `extra_kv`."""
        return self._after_attention(hidden, self.attention(hidden, mask, extra_kv))

    def cls_only(self, hidden: Tensor, mask: Tensor | None, extra_kv: KeysValues | None = None) -> Tensor:
        """[CLS] of `forward`'s result, (B, 1, d), without computing the other tokens."""
        return self._after_attention(hidden[:, :1], self.attention.cls_only(hidden, mask, extra_kv))

    def _after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = self.attention_norm(hidden + attended)
        return self.mlp_norm(hidden + self.mlp(hidden))  # type: ignore[no-any-return]


class TextEmbeddings(nn.Module):
    """BERT's word, position and type embeddings, and the norm over their sum."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.words = empty_embedding(config.vocab_size, config.dim)
        self.positions = empty_embedding(config.max_positions, config.dim)
        self.types = empty_embedding(2, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def embed_text(self, text_ids: Tensor) -> Tensor:  # (Q, T) -> (Q, T, d)
        positions = self.positions.weight[: text_ids.shape[1]]
        return self.norm(self.words(text_ids) + positions + self.types.weight[TEXT])  # type: ignore[no-any-return]


class JointEncoder(TextEmbeddings):
    """Embeddings, layers over the whole sequence, and the matching head."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__(config)
        self.sep_id = config.sep_id
        self.layers = nn.ModuleList(JointBlock(config) for _ in range(config.num_layers))
        self.head = MatchingHead(config)

    def encode_visual(self, visual: Tensor) -> Tensor:  # (B, m, d) -> (B, m, d)
        """The visual tokens to store: the adapter's tokens unchanged."""
        return visual

    def encode_queries(self, text_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:  # (Q, T) -> (Q, T, d)
        """Embedded captions with [CLS] and [SEP]; any token may pad them on the right, because `score` masks it."""
        return self.embed_text(text_ids)

    def score(
        self,
        text: Tensor,
        visual: Tensor,
        text_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits of pairs, (B,).

        Args:
            text: encoded captions, (B, T, d).
            visual: stored visual tokens, (B, m, d).
            text_lengths: lengths of the captions without padding, (B,); None if none is padded.
        """
        hidden, mask = self._joined(text, visual, text_lengths)
        *layers, last = (cast(JointBlock, layer) for layer in self.layers)
        for layer in layers:
            hidden = layer(hidden, mask)
        return self.head(last.cls_only(hidden, mask)[:, 0])  # type: ignore[no-any-return]

    def text_states(self, text: Tensor, visual: Tensor | None, text_lengths: Tensor | None = None) -> Tensor:
        """The caption's tokens after the last layer, (B, T, d); without `visual` the image is left out."""
        return self.text_states_by_layer(text, visual, text_lengths)[-1]

    def text_states_by_layer(
        self, text: Tensor, visual: Tensor | None, text_lengths: Tensor | None = None
    ) -> list[Tensor]:
        """The caption's tokens after each layer, (B, T, d) each."""
        hidden, mask = self._joined(text, visual, text_lengths)
        states = []
        for layer in self.layers:
            hidden = layer(hidden, mask)
            states.append(hidden[:, : text.shape[1]])
        return states

    def _joined(self, text: Tensor, visual: Tensor | None, text_lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The whole sequence (B, S, d) in the layers' precision, and its attention mask (B, 1, 1, S)."""
        images = None if visual is None else self._embed_visual(visual, text.shape[1], text_lengths)
        num_images = 0 if images is None else images.shape[1]
        mask = None if text_lengths is None else attention_mask(text_lengths, text.shape[1], num_images)
        hidden = text if images is None else torch.cat((text, images), dim=1)
        return hidden.to(compute_dtype(self.layers)), mask

    def _embed_visual(self, visual: Tensor, num_text: int, text_lengths: Tensor | None) -> Tensor:
        """Visual tokens and the last [SEP], at the positions that follow the caption: (B, m + 1, d)."""
        num_added = visual.shape[1] + 1
        if text_lengths is None:
            positions = self.positions.weight[num_text : num_text + num_added]
        else:
            positions = self.positions(text_lengths[:, None] + torch.arange(num_added, device=visual.device))
        sep = self.words.weight[self.sep_id].expand(visual.shape[0], 1, -1)
        words = torch.cat((visual.to(sep.dtype), sep), dim=1)
        return self.norm(words + positions + self.types.weight[IMAGE])  # type: ignore[no-any-return]


def attention_mask(text_lengths: Tensor, num_text: int, num_images: int) -> Tensor:
    """False at the text's padding, True elsewhere: (B, 1, 1, num_text + num_images)."""
    is_text = torch.arange(num_text, device=text_lengths.device) < text_lengths[:, None]
    is_image = is_text.new_ones((text_lengths.shape[0], num_images))
    return torch.cat((is_text, is_image), dim=1)[:, None, None, :]


def compute_dtype(layers: nn.ModuleList) -> torch.dtype:
    """The precision that the layers compute in: that of their weights."""
    return next(layers.parameters()).dtype

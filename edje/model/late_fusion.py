"""Joint encoders that encode text and image separately before they fuse them, so that a pair costs less.

After PreTTR (arXiv 2004.14255) and MICE (arXiv 2602.16299), which do this for text. The text layers run once per query.
The visual layers run once per image, offline, and their output is stored; it is as large as the adapter's tokens.
Visual tokens have positions that do not depend on the caption, because the caption is unknown when they are stored.

    late      fusion layers that update text and image
    minimal   fusion layers that update the text alone; it attends to itself and to the stored visual tokens
    maxsim    no fusion layers: each text token finds its most similar visual token (ColBERT, arXiv 2004.12832)

Position vectors are added before the visual layers and once more before the fusion layers, because states trained by a
late interaction, which ignores positions, lose them (docs/LOG.md).

With a `match_dim`, `late` and `minimal` add a late interaction to their logit, so that the checkpoint also contains the
cheap scorer of a cascade.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje.config import JointConfig
from edje.layers import KeysValues, empty_embedding
from edje.model.head import MatchingHead
from edje.model.joint import IMAGE, JointBlock, TextEmbeddings, attention_mask, compute_dtype

#: Initial factor on the similarity: a mean cosine higher by 0.5 multiplies the odds by 150, as in CLIP.
INITIAL_SCALE = 10.0


class TextUpdateBlock(JointBlock):
    """A layer that updates the text alone; the text attends to itself and to fixed visual tokens."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__(config)
        self.visual_kv = nn.Linear(config.dim, 2 * config.dim)

    def keys_values(self, visual: Tensor) -> KeysValues:  # (B, m, d) -> two (B, H, m, d / H)
        keys, values = self.visual_kv(visual).chunk(2, dim=-1)
        return self.attention.split_heads(keys), self.attention.split_heads(values)

    def split_keys_values(self, keys_values: Tensor) -> KeysValues:  # (B, 2, m, d) -> two (B, H, m, d / H)
        return self.attention.split_heads(keys_values[:, 0]), self.attention.split_heads(keys_values[:, 1])


class LateInteraction(nn.Module):
    """Cosine of each text token to its most similar visual token, averaged over the text, scaled and shifted."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.text = nn.Linear(config.dim, config.match_dim)
        self.visual = nn.Linear(config.dim, config.match_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.bias = nn.Parameter(torch.zeros(()))

    def project_text(self, text: Tensor) -> Tensor:  # (..., T, d) -> (..., T, k)
        """Unit vectors of the text tokens; `compare` takes them."""
        return self._unit(self.text, text)

    def project_visual(self, visual: Tensor) -> Tensor:  # (..., m, d) -> (..., m, k)
        """Unit vectors of the visual tokens; `compare` takes them."""
        return self._unit(self.visual, visual)

    def compare(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None) -> Tensor:
        """The late interaction of projected pairs: (B, T, k), (B, m, k) -> (B,). A batch of one text is broadcast."""
        return self._mean((text @ visual.transpose(1, 2)).amax(dim=2), text_lengths)

    def score_pairs(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None) -> Tensor:
        """Scores of text i with image i: (B, T, d), (B, m, d) -> (B,)."""
        return self.compare(self.project_text(text), self.project_visual(visual), text_lengths)

    def score_matrix(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None) -> Tensor:
        """Scores of every text with every image: (Q, T, d), (N, m, d) -> (Q, N)."""
        texts, visuals = self.project_text(text), self.project_visual(visual)
        best = torch.einsum("qtd,nmd->qntm", texts, visuals).amax(dim=3)
        return self._mean(best, None if text_lengths is None else text_lengths[:, None])

    @staticmethod
    def _unit(layer: nn.Linear, hidden: Tensor) -> Tensor:
        return functional.normalize(layer(hidden.to(layer.weight.dtype)), dim=-1)

    def _mean(self, best: Tensor, text_lengths: Tensor | None) -> Tensor:  # (..., T) -> (...)
        if text_lengths is None:
            mean = best.mean(dim=-1)
        else:
            is_text = torch.arange(best.shape[-1], device=best.device) < text_lengths[..., None]
            mean = (best * is_text).sum(dim=-1) / text_lengths
        return self.log_scale.exp() * mean + self.bias


class LateFusionEncoder(TextEmbeddings):
    """Text layers, visual layers, fusion layers and late interaction, as the configuration asks for."""

    def __init__(self, config: JointConfig, num_visual_tokens: int) -> None:
        super().__init__(config)
        self.kind = config.kind
        self.visual_positions = empty_embedding(num_visual_tokens, config.dim)
        self.visual_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        # Added before the fusion layers; checkpoints hold the positions under this name.
        self.meeting_positions = empty_embedding(num_visual_tokens, config.dim) if config.num_layers else None
        block = TextUpdateBlock if config.kind == "minimal" else JointBlock
        self.text_layers = nn.ModuleList(JointBlock(config) for _ in range(config.text_layers))
        self.visual_layers = nn.ModuleList(JointBlock(config) for _ in range(config.visual_layers))
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.match = LateInteraction(config) if config.match_dim else None
        self.head = MatchingHead(config) if config.num_layers else None

    def encode_visual(self, visual: Tensor) -> Tensor:  # (B, m, d) -> (B, m, d)
        """The visual tokens to store: the adapter's tokens after the visual layers."""
        embedded = visual.to(self.types.weight.dtype) + self.visual_positions.weight + self.types.weight[IMAGE]
        hidden = self.visual_norm(embedded)
        if len(self.visual_layers):
            hidden = hidden.to(compute_dtype(self.visual_layers))
        for layer in self.visual_layers:
            hidden = layer(hidden, None)
        return hidden  # type: ignore[no-any-return]

    def encode_queries(self, text_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:  # (Q, T) -> (Q, T, d)
        """Captions with [CLS] and [SEP] after the text layers; padding is masked."""
        hidden = self.embed_text(text_ids)
        mask = None if text_lengths is None else attention_mask(text_lengths, text_ids.shape[1], 0)
        if len(self.text_layers):
            hidden = hidden.to(compute_dtype(self.text_layers))
        for layer in self.text_layers:
            hidden = layer(hidden, mask)
        return hidden

    def score(
        self,
        text: Tensor,
        visual: Tensor | None,
        text_lengths: Tensor | None = None,
        *,
        match: Tensor | None = None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """See `JointEncoder.score`; `visual` is the output of `encode_visual`.

        Parts that were computed before are passed in: `match` (B,) is the pairs' late interaction, `keys_values` the
        rows of `visual_keys_values` for the pairs' images. With both, `visual` is not read.
        """
        logit: Tensor | float = 0.0
        if self.head is not None:
            *_, last = self._fused(text, visual, text_lengths, cls_only=True, keys_values=keys_values)
            logit = self.head(last[:, 0])
        if self.match is not None:
            if match is None:
                assert visual is not None, "a late interaction reads the visual tokens"
                match = self.match.score_pairs(text, visual, text_lengths)
            logit = logit + match
        return cast(Tensor, logit)

    def similarity(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """The late interaction alone, (Q, T, d), (N, m, d) -> (Q, N). Raises `ValueError` if there is none."""
        if self.match is None:
            raise ValueError("this encoder was built without a late interaction (match_dim is 0)")
        return self.match.score_matrix(text, visual, text_lengths)

    def text_states(self, text: Tensor, visual: Tensor | None, text_lengths: Tensor | None = None) -> Tensor:
        """The caption's tokens after the last fusion layer, (B, T, d); `text` itself without image or fusion layers."""
        if visual is None or not len(self.layers):
            return text
        return self.text_states_by_layer(text, visual, text_lengths)[-1]

    def text_states_by_layer(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None = None) -> list[Tensor]:
        """The caption's tokens after each fusion layer, (B, T, d) each."""
        return [hidden[:, : text.shape[1]] for hidden in self._fused(text, visual, text_lengths, cls_only=False)]

    def visual_keys_values(self, visual: Tensor) -> Tensor:
        """The visual keys and values of every layer of a `minimal` encoder: (N, m, d) -> (N, L, 2, m, d)."""
        assert self.meeting_positions is not None, "only an encoder of kind 'minimal' has them"
        dtype = compute_dtype(self.layers)
        visual = visual.to(dtype) + self.meeting_positions.weight.to(dtype)
        by_layer = [cast(TextUpdateBlock, layer).visual_kv(visual).chunk(2, dim=-1) for layer in self.layers]
        return torch.stack([torch.stack(pair, dim=1) for pair in by_layer], dim=1)

    def _fused(
        self,
        text: Tensor,
        visual: Tensor | None,
        text_lengths: Tensor | None,
        *,
        cls_only: bool,
        keys_values: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The states after each fusion layer, (B, S, d); with `cls_only` the last are [CLS] alone, (B, 1, d)."""
        assert self.meeting_positions is not None  # exists whenever there are fusion layers
        dtype = compute_dtype(self.layers)
        text = text.to(dtype)
        if keys_values is None:
            assert visual is not None, "without their keys and values the visual tokens are read"
            visual, num_visual = visual.to(dtype) + self.meeting_positions.weight.to(dtype), visual.shape[1]
        else:
            visual, num_visual = None, keys_values.shape[3]
        mask = None if text_lengths is None else attention_mask(text_lengths, text.shape[1], num_visual)
        hidden = text if self.kind == "minimal" or visual is None else torch.cat((text, visual), dim=1)
        last = len(self.layers) - 1
        for number, module in enumerate(self.layers):
            layer = cast(JointBlock, module)
            extra_kv = None
            if isinstance(layer, TextUpdateBlock):
                if keys_values is not None:
                    extra_kv = layer.split_keys_values(keys_values[:, number])
                elif visual is not None:
                    extra_kv = layer.keys_values(visual)
            is_last_cls = cls_only and number == last
            hidden = layer.cls_only(hidden, mask, extra_kv) if is_last_cls else layer(hidden, mask, extra_kv)
            yield hidden

"""Encoders that read text and image apart before they meet, so that less is left to do for a pair.

After PreTTR (arXiv 2004.14255) and MICE (arXiv 2602.16299), which did this for text. The text layers run once per
query, the visual layers once per image, offline: what is stored is their result, as large as the adapter's tokens.
Visual tokens have positions of their own, because they must not depend on a caption they have never seen.

    late      the layers after the meeting update text and image
    minimal   they update the text alone; it looks at itself and at the image's states, which stay as stored
    maxsim    there are none: each text token looks for its most similar visual token (ColBERT, arXiv 2004.12832)

Where a visual token lies is said twice: to the visual layers, and again at the meeting. A late interaction asks what a
token shows wherever it lies, and states that were taught by it no longer tell (docs/LOG.md).

With a `match_dim`, `late` and `minimal` add that similarity to their logit: one checkpoint then also has the cheap
scorer that a cascade begins with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edje.config import JointConfig
from edje.layers import table
from edje.model.head import FirstStageInput, MatchingHead
from edje.model.joint import IMAGE, JointBlock, TextEmbeddings, compute_dtype, visible

#: Of the similarity at the start of training: a mean cosine of 0.5 more is a factor of 150 in the odds, as in CLIP.
INITIAL_SCALE = 10.0


class InteractionBlock(JointBlock):
    """A layer in which text looks at itself and at visual states that nobody updates, through a map of their own."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__(config)
        self.visual_kv = nn.Linear(config.dim, 2 * config.dim)

    def keys_values(self, visual: Tensor) -> tuple[Tensor, Tensor]:  # (B, m, d) -> two (B, H, m, d / H)
        keys, values = self.visual_kv(visual).chunk(2, dim=-1)
        return self.attention.by_head(keys), self.attention.by_head(values)

    def by_head(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:  # (B, 2, m, d) -> two (B, H, m, d / H)
        return self.attention.by_head(keys_values[:, 0]), self.attention.by_head(keys_values[:, 1])


class TokenMatch(nn.Module):
    """Late interaction: for each text token the most similar visual token, averaged over the text."""

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

    def pairs(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None) -> Tensor:
        """The late interaction of pairs: (B, T, d), (B, m, d) -> (B,)."""
        return self.compare(self.project_text(text), self.project_visual(visual), text_lengths)

    def matrix(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None) -> Tensor:
        """(Q, T, d), (N, m, d) -> (Q, N): everything with everything."""
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


class ApartEncoder(TextEmbeddings):
    """Text layers, visual layers, and how the two meet."""

    def __init__(self, config: JointConfig, num_visual_tokens: int) -> None:
        super().__init__(config)
        self.kind = config.kind
        self.visual_positions = table(num_visual_tokens, config.dim)
        self.visual_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.meeting_positions = table(num_visual_tokens, config.dim) if config.num_layers else None
        block = InteractionBlock if config.kind == "minimal" else JointBlock
        self.text_layers = nn.ModuleList(JointBlock(config) for _ in range(config.text_layers))
        self.visual_layers = nn.ModuleList(JointBlock(config) for _ in range(config.visual_layers))
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.match = TokenMatch(config) if config.match_dim else None
        self.head = MatchingHead(config) if config.num_layers else None
        no_head = config.num_layers == 0 and config.first_stage is not None
        self.first_stage = FirstStageInput(config.first_stage, 1) if no_head and config.first_stage else None

    @property
    def score_input(self) -> FirstStageInput | None:
        """Where the first stage's score comes in, if this encoder reads it."""
        return self.first_stage if self.head is None else self.head.first_stage

    def encode_visual(self, visual: Tensor) -> Tensor:  # (B, m, d) -> (B, m, d)
        """The adapter's tokens after the visual layers: what is stored of an image."""
        embedded = visual.to(self.types.weight.dtype) + self.visual_positions.weight + self.types.weight[IMAGE]
        hidden = self.visual_norm(embedded)
        if len(self.visual_layers):
            hidden = hidden.to(compute_dtype(self.visual_layers))
        for layer in self.visual_layers:
            hidden = layer(hidden, None)
        return hidden  # type: ignore[no-any-return]

    def encode_queries(self, text_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:  # (Q, T) -> (Q, T, d)
        """Captions with their [CLS] and [SEP] after the text layers; padding is not looked at."""
        hidden = self.embed_text(text_ids)
        mask = None if text_lengths is None else visible(text_lengths, text_ids.shape[1], 0)
        if len(self.text_layers):
            hidden = hidden.to(compute_dtype(self.text_layers))
        for layer in self.text_layers:
            hidden = layer(hidden, mask)
        return hidden

    def score(
        self,
        text: Tensor,
        visual: Tensor,
        text_lengths: Tensor | None = None,
        first_stage: Tensor | None = None,
        *,
        match: Tensor | None = None,
        keys_values: Tensor | None = None,
    ) -> Tensor:
        """See `JointEncoder.score`; `visual` is the output of `encode_visual`.

        Parts that were computed before are passed in: `match` (B,) is the pairs' late interaction, `keys_values` the
        rows of `visual_keys_values` for the pairs' images.
        """
        logit: Tensor | float = 0.0
        if self.head is not None:
            *_, last = self._meet(text, visual, text_lengths, cls_only=True, keys_values=keys_values)
            logit = self.head(last[:, 0], first_stage)
        if self.match is not None:
            logit = logit + (self.match.pairs(text, visual, text_lengths) if match is None else match)
        if self.first_stage is not None:
            score = first_stage if first_stage is not None else text.new_full(text.shape[:1], float("nan"))
            added, straight = self.first_stage(score)
            logit = logit + added[:, 0] + straight
        return cast(Tensor, logit)

    def similarity(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """(Q, T, d), (N, m, d) -> (Q, N): the late interaction alone, for an encoder that has one."""
        if self.match is None:
            raise ValueError("this encoder was built without a late interaction (match_dim is 0)")
        return self.match.matrix(text, visual, text_lengths)

    def read(self, text: Tensor, visual: Tensor | None, text_lengths: Tensor | None = None) -> Tensor:
        """The caption's tokens after the last layer, (B, T, d): read with the image, or (None) as they are."""
        if visual is None or not len(self.layers):
            return text
        return self.read_by_layer(text, visual, text_lengths)[-1]

    def read_by_layer(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None = None) -> list[Tensor]:
        """The same after each layer."""
        return [hidden[:, : text.shape[1]] for hidden in self._meet(text, visual, text_lengths, cls_only=False)]

    def visual_keys_values(self, visual: Tensor) -> Tensor:
        """The visual keys and values of every layer of a `minimal` encoder: (N, m, d) -> (N, L, 2, m, d)."""
        assert self.meeting_positions is not None, "only an encoder of kind 'minimal' has them"
        dtype = compute_dtype(self.layers)
        visual = visual.to(dtype) + self.meeting_positions.weight.to(dtype)
        by_layer = [cast(InteractionBlock, layer).visual_kv(visual).chunk(2, dim=-1) for layer in self.layers]
        return torch.stack([torch.stack(pair, dim=1) for pair in by_layer], dim=1)

    def _meet(
        self,
        text: Tensor,
        visual: Tensor,
        text_lengths: Tensor | None,
        *,
        cls_only: bool,
        keys_values: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """What each layer gives, (B, S, d); of the last one only [CLS] if that is enough."""
        assert self.meeting_positions is not None  # there are layers
        dtype = compute_dtype(self.layers)
        mask = None if text_lengths is None else visible(text_lengths, text.shape[1], visual.shape[1])
        text, visual = text.to(dtype), visual.to(dtype) + self.meeting_positions.weight.to(dtype)
        hidden = text if self.kind == "minimal" else torch.cat((text, visual), dim=1)
        last = len(self.layers) - 1
        for number, module in enumerate(self.layers):
            layer = cast(JointBlock, module)
            beside = None
            if isinstance(layer, InteractionBlock):
                beside = layer.keys_values(visual) if keys_values is None else layer.by_head(keys_values[:, number])
            hidden = layer.first(hidden, mask, beside) if cls_only and number == last else layer(hidden, mask, beside)
            yield hidden

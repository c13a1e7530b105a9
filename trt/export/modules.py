"""The three parts of a model as torch modules with the inputs and outputs of the graphs, in one precision.

They run the model's own code. Added are the conversion of stored bytes to tokens by arithmetic, and norms that compute
in float32 in every precision. Knows torch, and nothing of ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edje.model.edje import Edje
from protocols.quantize import restore
from trt.graphs import Precision
from trt.slab.layout import SlotLayout

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ImagePart(nn.Module):
    """`pixels` to `tokens` and `pooled`."""

    def __init__(self, model: Edje) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # uint8 (n, 3, S, S) -> (n, m, d), (n, e)
        tokens, pooled = self.model.encode_images(pixels)
        return tokens.float(), pooled.float()


class NormalisedPixels(nn.Module):
    """The step before a vision tower that is not part of the module: `pixels` to the tower's input."""

    def __init__(self, model: Edje) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:  # uint8 (n, 3, S, S) -> float32 (n, 3, S, S)
        return self.model.normalise(pixels).float()


class TokensOfPatches(nn.Module):
    """The step after that tower: its `patches`, and its `tower_pooled` if it has one, to `tokens` and `pooled`."""

    def __init__(self, model: Edje) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, tower_pooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(n, s, w), (n, e) -> (n, m, d), (n, e)"""
        pooled = patches.mean(dim=1) if tower_pooled is None else tower_pooled
        return self.model.encode_patches(patches).float(), pooled


class QueryPart(nn.Module):
    """`text_ids` and `text_lengths` to `states`."""

    def __init__(self, model: Edje, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, text_ids: Tensor, text_lengths: Tensor) -> Tensor:  # (q, t), (q,) -> (q, t, d)
        return self.model.encode_queries(text_ids, text_lengths).to(self.dtype)


class PairPart(nn.Module):
    """`states`, `text_lengths`, `pair_query`, stored tokens and scales, and first-stage scores to `logits`."""

    def __init__(self, model: Edje, layout: SlotLayout) -> None:
        super().__init__()
        self.model = model
        self.layout = layout

    def forward(
        self,
        states: Tensor,
        text_lengths: Tensor,
        pair_query: Tensor,
        tokens: Tensor,
        scales: Tensor | None = None,
    ) -> Tensor:
        """(q, t, d), (q,), (p,), then (p, ...) as in `trt.graphs.stored_tokens` -> (p,)"""
        text, lengths = states.index_select(0, pair_query), text_lengths.index_select(0, pair_query)
        visual = stored_to_tokens(self.layout, tokens, scales)
        return self.model.score(text, visual, lengths).float()


def stored_to_tokens(layout: SlotLayout, tokens: Tensor, scales: Tensor | None) -> Tensor:
    """Convert stored numbers to tokens, float32 (p, m, d), by float32 arithmetic alone.

    Bits are not reinterpreted: TensorRT casts uint8 to float32 and does nothing else with it.
    """
    values = tokens.float()
    if scales is None:
        return values
    if layout.storage == "int8":
        values = values - 256.0 * (values >= 128.0).float()  # two's complement
    restored: Tensor = restore(
        layout.storage,
        values.view(-1, layout.num_tokens, values.shape[1] // layout.num_tokens),
        scales.float(),
        torch.stack,
    )
    return restored


class Float32Norm(nn.Module):
    """A norm that computes in float32 between layers of half precision, in which its sums would overflow."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.float()).to(hidden.dtype)  # type: ignore[no-any-return]


def to_precision(model: Edje, precision: Precision) -> Edje:
    """Convert tower, adapter and layers, except their norms, to a precision, in place.

    Embeddings, head and late interaction stay in float32, as in the torch engine.
    """
    if precision == "fp32":
        return model.float()
    dtype = DTYPES[precision]
    layers = [part for part in model.joint.children() if isinstance(part, nn.ModuleList)]
    for part in (model.vision, model.adapter, *layers):
        part.to(dtype)
        for module in list(part.modules()):
            for name, child in module.named_children():
                if isinstance(child, (nn.LayerNorm, nn.GroupNorm)):
                    setattr(module, name, Float32Norm(child))
    return model


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` in the steps that TensorRT recognises and fuses; the softmax is in float32.

    Queries are scaled before the product, which avoids overflow and allows the fusion. Masked keys get a weight of
    exactly zero. A value that is not finite stays so; torch's own translation to ONNX would turn it into zero.
    """
    if dropout_p or is_causal or enable_gqa:
        raise ValueError("these models are served without dropout, causal masks and grouped heads")
    factor = queries.shape[-1] ** -0.5 if scale is None else scale
    logits = ((queries * factor) @ keys.transpose(-2, -1)).float()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = torch.where(attn_mask, logits, torch.finfo(torch.float32).min)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(dim=-1).to(values.dtype) @ values

"""Stored bytes to visual tokens, in torch, for every storage type."""

from __future__ import annotations

import torch
from torch import Tensor

from protocols.quantize import INT4_GROUP
from trt.slab.layout import SlotLayout


def dequantise(layout: SlotLayout, tokens: Tensor, scales: Tensor) -> Tensor:
    """uint8 (B, token bytes) and (B, scale bytes) -> float32 (B, m, d)."""
    num_pairs, num_tokens, dim = tokens.shape[0], layout.num_tokens, layout.token_dim
    if layout.storage in ("fp16", "bf16"):
        stored = tokens.view(torch.float16 if layout.storage == "fp16" else torch.bfloat16)
        return stored.view(num_pairs, num_tokens, dim).float()
    if layout.storage == "int8":
        quantised = tokens.view(torch.int8).view(num_pairs, num_tokens, dim)
        return quantised * scales.view(torch.float32)[:, :, None]
    # int4: the value plus 8 in each half of a byte, the lower half first.
    halves = torch.stack((tokens & 15, tokens >> 4), dim=-1).to(torch.int8) - 8
    groups = halves.view(num_pairs, num_tokens, dim // INT4_GROUP, INT4_GROUP)
    per_group = scales.view(torch.float16).float().view(num_pairs, num_tokens, dim // INT4_GROUP, 1)
    return (groups * per_group).view(num_pairs, num_tokens, dim)

"""Layers that the vision tower, the adapter and the joint encoder share. Knows tensors only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Keys and values of another sequence, split into heads: two tensors (B, H, S, D / H).
KeysValues = tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    The sequence can attend to keys and values of another sequence as well (`extra_kv`).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, extra_kv: KeysValues | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D). The mask (B, 1, 1, S') is True where attention is allowed, over both sequences."""
        queries, keys, values = (self.split_heads(part) for part in self.qkv(hidden).chunk(3, dim=-1))
        return self._attend(queries, keys, values, mask, extra_kv)

    def cls_only(self, hidden: Tensor, mask: Tensor | None = None, extra_kv: KeysValues | None = None) -> Tensor:
        """The first token of `forward`'s result, (B, 1, D), without computing the others."""
        dim = hidden.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        queries = functional.linear(hidden[:, :1], weight[:dim], bias[:dim])
        keys, values = functional.linear(hidden, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        return self._attend(self.split_heads(queries), self.split_heads(keys), self.split_heads(values), mask, extra_kv)

    def split_heads(self, hidden: Tensor) -> Tensor:  # (B, S, D) -> (B, H, S, D / H)
        batch, length, dim = hidden.shape
        return hidden.view(batch, length, self.num_heads, dim // self.num_heads).transpose(1, 2)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, extra_kv: KeysValues | None
    ) -> Tensor:
        if extra_kv is not None:
            keys, values = torch.cat((keys, extra_kv[0]), dim=2), torch.cat((values, extra_kv[1]), dim=2)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another, with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:  # (B, T, D), (B, S, D) x 2 -> (B, T, D)
        return self.attention(queries, keys, values, need_weights=False)[0]  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two linear maps with a GELU between them; `approximate` is passed to torch's GELU."""

    def __init__(self, dim: int, hidden_dim: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.fc2(functional.gelu(self.fc1(hidden), approximate=self.approximate))  # type: ignore[no-any-return]


def empty_embedding(num_rows: int, dim: int) -> nn.Embedding:
    """An embedding with uninitialised weights.

    Torch's default initialisation on the meta device imports its compiler, which takes seconds.
    """
    return nn.Embedding(num_rows, dim, _weight=torch.empty(num_rows, dim))

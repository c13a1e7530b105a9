"""A plain reference of the joint encoders: one pair, no batch, no shared projections, float64.

Uses a module's weights and configuration, and none of its code.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edje.config import JointConfig

Matrix = NDArray[np.float64]


class PlainEncoder:
    """Computes with the weights of a `JointEncoder` or `LateFusionEncoder`."""

    def __init__(self, joint, config: JointConfig) -> None:
        self.weights = {name: tensor.double().numpy() for name, tensor in joint.state_dict().items()}
        self.config = config

    def logit(self, text_ids: NDArray[np.int64], visual: Matrix) -> float:
        """The logit of one caption and one image, given as the adapter's tokens."""
        if self.config.kind == "full":
            return self.head(self.full(text_ids, visual))
        text = self.layers("text_layers", self.text(text_ids))
        visual = self.layers("visual_layers", self.visual(visual))
        logit = self.match(text, visual) if self.config.match_dim else 0.0
        if self.config.kind == "maxsim":
            return logit
        visual = visual + self.weights["meeting_positions.weight"]
        if self.config.kind == "late":
            cls = self.layers("layers", np.concatenate([text, visual]))[0]
        else:
            cls = self.layers("layers", text, extra=visual)[0]
        return logit + self.head(cls)

    def full(self, text_ids: NDArray[np.int64], visual: Matrix) -> Matrix:
        words = self.weights["words.weight"]
        sequence = np.concatenate([words[text_ids], visual, words[[self.config.sep_id]]])
        types = [0] * len(text_ids) + [1] * (len(visual) + 1)
        positions = self.weights["positions.weight"][: len(sequence)]
        hidden = self.norm(sequence + positions + self.weights["types.weight"][types], "norm")
        return self.layers("layers", hidden)[0]

    def text(self, text_ids: NDArray[np.int64]) -> Matrix:
        words, positions = self.weights["words.weight"][text_ids], self.weights["positions.weight"][: len(text_ids)]
        return self.norm(words + positions + self.weights["types.weight"][0], "norm")

    def visual(self, tokens: Matrix) -> Matrix:
        positions = self.weights["visual_positions.weight"]
        return self.norm(tokens + positions + self.weights["types.weight"][1], "visual_norm")

    def layers(self, name: str, hidden: Matrix, extra: Matrix | None = None) -> Matrix:
        number = 0
        while f"{name}.{number}.mlp.fc1.weight" in self.weights:
            hidden = self.layer(f"{name}.{number}", hidden, extra)
            number += 1
        return hidden

    def layer(self, name: str, hidden: Matrix, extra: Matrix | None) -> Matrix:
        queries, keys, values = np.split(self.linear(hidden, f"{name}.attention.qkv"), 3, axis=-1)
        if extra is not None:
            more_keys, more_values = np.split(self.linear(extra, f"{name}.visual_kv"), 2, axis=-1)
            keys, values = np.concatenate([keys, more_keys]), np.concatenate([values, more_values])
        width = self.config.dim // self.config.num_heads
        mixed = np.empty_like(hidden)
        for head in range(self.config.num_heads):
            part = slice(head * width, (head + 1) * width)
            attention = np.exp(queries[:, part] @ keys[:, part].T / math.sqrt(width))
            mixed[:, part] = attention / attention.sum(-1, keepdims=True) @ values[:, part]
        hidden = self.norm(hidden + self.linear(mixed, f"{name}.attention.out"), f"{name}.attention_norm")
        inner = self.linear(gelu(self.linear(hidden, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        return self.norm(hidden + inner, f"{name}.mlp_norm")

    def match(self, text: Matrix, visual: Matrix) -> float:
        texts, visuals = unit(self.linear(text, "match.text")), unit(self.linear(visual, "match.visual"))
        best = [max(float(one @ other) for other in visuals) for one in texts]
        return float(math.exp(self.weights["match.log_scale"]) * np.mean(best) + self.weights["match.bias"])

    def head(self, cls: Matrix) -> float:
        return float(self.linear(np.tanh(self.linear(cls, "head.pooler")), "head.out")[0])

    def linear(self, x: Matrix, name: str) -> Matrix:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Matrix, name: str) -> Matrix:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.config.norm_eps)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: Matrix) -> Matrix:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def unit(x: Matrix) -> Matrix:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

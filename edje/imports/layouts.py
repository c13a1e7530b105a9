"""Where each of our weights stands in other people's state dictionaries: transformers' BERT and its SigLIP tower.

Names and shapes, and the one way of joining tensors that they need; knows neither files nor models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of ours is these of theirs, one below the other; `boxed` gives it a leading axis of one."""

    ours: str
    theirs: tuple[str, ...]
    boxed: bool = False

    def prefixed(self, ours: str, theirs: str) -> Rule:
        """The same rule with both sides inside larger models."""
        return Rule(ours + self.ours, tuple(theirs + name for name in self.theirs), self.boxed)

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor, always a copy."""
        joined = torch.cat([tensors[name] for name in self.theirs])
        return joined[None] if self.boxed else joined

    def their_shape(self, our_shape: tuple[int, ...]) -> tuple[int, ...]:
        """What each of their tensors has to measure."""
        shape = our_shape[1:] if self.boxed else our_shape
        return (shape[0] // len(self.theirs), *shape[1:])


#: Where BERT's pooler and the logit's layer stand within a joint encoder.
POOLER, LOGIT = "head.pooler.", "head.out."

_QKV = "attention.qkv"

#: Ours within one layer, theirs within transformers' BertLayer; several are stacked.
_BERT_LAYER = {
    _QKV: ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
_BERT_TABLES = {
    "words.weight": "word_embeddings.weight",
    "positions.weight": "position_embeddings.weight",
    "types.weight": "token_type_embeddings.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
}
#: transformers' SiglipEncoderLayer.
_SIGLIP_LAYER = {
    "attention_norm": ("layer_norm1",),
    _QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.out_proj",),
    "mlp_norm": ("layer_norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
#: transformers' SiglipVisionTransformer outside its layers: our name, theirs, and whether ours is boxed.
_SIGLIP_REST = (
    ("patches.weight", "embeddings.patch_embedding.weight", False),
    ("patches.bias", "embeddings.patch_embedding.bias", False),
    ("positions", "embeddings.position_embedding.weight", True),
    ("norm.weight", "post_layernorm.weight", False),
    ("norm.bias", "post_layernorm.bias", False),
    ("pool.probe", "head.probe", False),
    ("pool.attention.attention.in_proj_weight", "head.attention.in_proj_weight", False),
    ("pool.attention.attention.in_proj_bias", "head.attention.in_proj_bias", False),
    ("pool.attention.attention.out_proj.weight", "head.attention.out_proj.weight", False),
    ("pool.attention.attention.out_proj.bias", "head.attention.out_proj.bias", False),
    ("pool.norm.weight", "head.layernorm.weight", False),
    ("pool.norm.bias", "head.layernorm.bias", False),
    ("pool.mlp.fc1.weight", "head.mlp.fc1.weight", False),
    ("pool.mlp.fc1.bias", "head.mlp.fc1.bias", False),
    ("pool.mlp.fc2.weight", "head.mlp.fc2.weight", False),
    ("pool.mlp.fc2.bias", "head.mlp.fc2.bias", False),
)


def bert_embedding_rules() -> tuple[Rule, ...]:
    """Ours within a `JointEncoder`, theirs within a BertEmbeddings."""
    return tuple(Rule(ours, (theirs,)) for ours, theirs in _BERT_TABLES.items())


def bert_layer_rules(layers: Iterable[int]) -> tuple[Rule, ...]:
    """Ours within a `JointEncoder`, counted from 0; theirs within a BertModel: these layers, in this order."""
    return tuple(
        rule.prefixed(f"layers.{ours}.", f"encoder.layer.{theirs}.")
        for ours, theirs in enumerate(layers)
        for rule in _weights_and_biases(_BERT_LAYER)
    )


def siglip_rules(num_layers: int) -> tuple[Rule, ...]:
    """Ours within a `VisionTower`, theirs within a SiglipVisionTransformer."""
    layers = (
        rule.prefixed(f"layers.{number}.", f"encoder.layers.{number}.")
        for number in range(num_layers)
        for rule in _weights_and_biases(_SIGLIP_LAYER)
    )
    return (*(Rule(ours, (theirs,), boxed) for ours, theirs, boxed in _SIGLIP_REST), *layers)


def pooler_rules() -> tuple[Rule, ...]:
    """Ours within a `JointEncoder`, theirs within a BertPooler."""
    return tuple(Rule(f"{POOLER}{kind}", (f"dense.{kind}",)) for kind in ("weight", "bias"))


def missing_from(names: Iterable[str], rules: Sequence[Rule]) -> list[str]:
    """Which of their names the rules need and do not find."""
    have = set(names)
    return [name for rule in rules for name in rule.theirs if name not in have]


def misshapen(tensors: Mapping[str, Tensor], rules: Sequence[Rule], ours: Mapping[str, Tensor]) -> list[str]:
    """One remark for each of their tensors that has not the size that ours asks for."""
    return [
        f"{name} is {size(tensors[name].shape)}, expected {size(expected)}"
        for rule in rules
        for expected in [rule.their_shape(tuple(ours[rule.ours].shape))]
        for name in rule.theirs
        if name in tensors and tuple(tensors[name].shape) != expected
    ]


#: More names than this in one message help nobody.
_MAX_NAMES = 40


def listed(names: Sequence[str]) -> str:
    """All of them, or the first ones and how many more there are."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def size(shape: Sequence[int]) -> str:
    """A shape for people to read."""
    return " x ".join(map(str, shape)) or "a single number"


def _weights_and_biases(names: Mapping[str, tuple[str, ...]]) -> Iterator[Rule]:
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            yield Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs))

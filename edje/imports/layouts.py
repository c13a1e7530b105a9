"""Maps our tensor names to those of published state dictionaries: transformers' BERT and SigLIP vision tower.

Names and shapes only; knows neither files nor models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorRule:
    """Maps published tensors, concatenated, to one of our tensors; `adds_axis` adds a leading axis of size one."""

    ours: str
    theirs: tuple[str, ...]
    adds_axis: bool = False

    def prefixed(self, ours: str, theirs: str) -> TensorRule:
        """The rule with a prefix before the names of both sides."""
        return TensorRule(ours + self.ours, tuple(theirs + name for name in self.theirs), self.adds_axis)

    def apply(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor, as a copy."""
        joined = torch.cat([tensors[name] for name in self.theirs])
        return joined[None] if self.adds_axis else joined

    def their_shape(self, our_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that each of their tensors must have."""
        shape = our_shape[1:] if self.adds_axis else our_shape
        return (shape[0] // len(self.theirs), *shape[1:])


#: Prefixes of BERT's pooler and of the output layer in a joint encoder.
POOLER, OUTPUT = "head.pooler.", "head.out."

_QKV = "attention.qkv"

#: Our names within one layer, and theirs within transformers' BertLayer.
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
#: The same for transformers' SiglipEncoderLayer.
_SIGLIP_LAYER = {
    "attention_norm": ("layer_norm1",),
    _QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.out_proj",),
    "mlp_norm": ("layer_norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
#: transformers' SiglipVisionTransformer without its layers: our name, theirs, and `TensorRule.adds_axis`.
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


def bert_embedding_rules() -> tuple[TensorRule, ...]:
    """Rules from a BertEmbeddings to a `JointEncoder`."""
    return tuple(TensorRule(ours, (theirs,)) for ours, theirs in _BERT_TABLES.items())


def bert_layer_rules(layers: Iterable[int]) -> tuple[TensorRule, ...]:
    """Rules from these layers of a BertModel, in this order, to the layers of a `JointEncoder`, counted from 0."""
    return tuple(
        rule.prefixed(f"layers.{ours}.", f"encoder.layer.{theirs}.")
        for ours, theirs in enumerate(layers)
        for rule in _weights_and_biases(_BERT_LAYER)
    )


def siglip_rules(num_layers: int) -> tuple[TensorRule, ...]:
    """Rules from a SiglipVisionTransformer to a `VisionTower`."""
    layers = (
        rule.prefixed(f"layers.{number}.", f"encoder.layers.{number}.")
        for number in range(num_layers)
        for rule in _weights_and_biases(_SIGLIP_LAYER)
    )
    return (*(TensorRule(ours, (theirs,), adds_axis) for ours, theirs, adds_axis in _SIGLIP_REST), *layers)


def pooler_rules() -> tuple[TensorRule, ...]:
    """Rules from a BertPooler to a `JointEncoder`."""
    return tuple(TensorRule(f"{POOLER}{kind}", (f"dense.{kind}",)) for kind in ("weight", "bias"))


def missing_names(names: Iterable[str], rules: Sequence[TensorRule]) -> list[str]:
    """The names that the rules need and that are not among `names`."""
    present = set(names)
    return [name for rule in rules for name in rule.theirs if name not in present]


def shape_mismatches(
    tensors: Mapping[str, Tensor], rules: Sequence[TensorRule], ours: Mapping[str, Tensor]
) -> list[str]:
    """One phrase for each of their tensors whose shape does not match ours."""
    return [
        f"{name} is {format_shape(tensors[name].shape)}, expected {format_shape(expected)}"
        for rule in rules
        for expected in [rule.their_shape(tuple(ours[rule.ours].shape))]
        for name in rule.theirs
        if name in tensors and tuple(tensors[name].shape) != expected
    ]


#: Names in one message.
_MAX_NAMES = 40


def join_names(names: Sequence[str]) -> str:
    """The names separated by commas; of many, the first ones and the number of the others."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def format_shape(shape: Sequence[int]) -> str:
    """A shape as text, such as `3 x 4`."""
    return " x ".join(map(str, shape)) or "a single number"


def _weights_and_biases(names: Mapping[str, tuple[str, ...]]) -> Iterator[TensorRule]:
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            yield TensorRule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs))

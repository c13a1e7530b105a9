"""Inputs and outputs of an engine's three graphs: names, types and shapes, derived from a model's configuration.

    image   pixels                                                         -> tokens, pooled
    query   text_ids, text_lengths                                         -> states
    pair    states, text_lengths, pair_query, tokens [scales] -> logits

A dimension is a number, or one of the names below if it differs from call to call. The bytes of quantised tokens are
uint8 inputs, the only 8-bit integer that TensorRT accepts as a plain network input. TensorRT can only cast uint8 to
float32 or float16, so a graph begins with the cast.
Knows configurations only: no torch, no ONNX, no TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edje.config import EdjeConfig
from protocols.quantize import INT4_GROUP
from trt.slab.layout import SlotLayout

Precision = Literal["fp32", "fp16", "bf16"]
GraphName = Literal["image", "query", "pair"]
GRAPH_NAMES: tuple[GraphName, ...] = ("image", "query", "pair")

#: The dimensions that differ from call to call. `text_tokens` is the length to which texts are padded.
IMAGES, QUERIES, TEXT_TOKENS, PAIRS = "images", "queries", "text_tokens", "pairs"
#: The dynamic dimensions of each graph's inputs.
DIMENSIONS: dict[GraphName, tuple[str, ...]] = {
    "image": (IMAGES,),
    "query": (QUERIES, TEXT_TOKENS),
    "pair": (QUERIES, TEXT_TOKENS, PAIRS),
}

#: Tensor type of the layers' weights and activations.
PRECISION_TYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

#: Bytes of one value of each type that a graph's input or output can have.
ITEM_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `dtype` is a key of `ITEM_BYTES`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with every named dimension replaced by its size. Raises `KeyError` for a missing size."""
        return tuple(sizes[each] if isinstance(each, str) else each for each in self.shape)

    def num_bytes(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes of the tensor at these sizes."""
        return math.prod(self.sized(sizes)) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Inputs and outputs of a graph, in order."""

    name: GraphName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The named dimensions of the inputs, each once, in order."""
        named = (each for tensor in self.inputs for each in tensor.shape if isinstance(each, str))
        return tuple(dict.fromkeys(named))


def image_graph(config: EdjeConfig) -> GraphSpec:
    """RGB bytes to visual tokens and the tower's pooled embedding."""
    size = config.preprocess.image_size
    return GraphSpec(
        "image",
        (TensorSpec("pixels", "uint8", (IMAGES, 3, size, size)),),
        (
            TensorSpec("tokens", "float32", (IMAGES, config.adapter.num_tokens, config.joint.dim)),
            TensorSpec("pooled", "float32", (IMAGES, config.vision.pooled_dim)),
        ),
    )


def query_graph(config: EdjeConfig, precision: Precision) -> GraphSpec:
    """Padded texts to their states; `text_lengths` is the number of tokens of each text without padding."""
    return GraphSpec(
        "query",
        (TensorSpec("text_ids", "int32", (QUERIES, TEXT_TOKENS)), TensorSpec("text_lengths", "int32", (QUERIES,))),
        (_states(config, precision),),
    )


def pair_graph(config: EdjeConfig, storage: str, precision: Precision) -> GraphSpec:
    """States of queries and stored tokens of pairs to logits; `pair_query` is each pair's row in `states`."""
    inputs = [
        _states(config, precision),
        TensorSpec("text_lengths", "int32", (QUERIES,)),
        TensorSpec("pair_query", "int32", (PAIRS,)),
        *stored_tokens(config, storage),
    ]
    return GraphSpec("pair", tuple(inputs), (TensorSpec("logits", "float32", (PAIRS,)),))


def graphs_of(config: EdjeConfig, storage: str, precision: Precision) -> dict[GraphName, GraphSpec]:
    """Return all three graphs. Raises `EngineUnavailable` for a storage type that the tokens do not fit."""
    return {
        "image": image_graph(config),
        "query": query_graph(config, precision),
        "pair": pair_graph(config, storage, precision),
    }


def stored_tokens(config: EdjeConfig, storage: str) -> list[TensorSpec]:
    """Return `tokens` as they are stored in a slot, and `scales` if the storage type has them."""
    num_tokens, dim = config.adapter.num_tokens, config.joint.dim
    layout = SlotLayout(storage, num_tokens, dim)  # raises for a dimension that the storage type cannot hold
    if storage == "fp16":
        return [TensorSpec("tokens", "float16", (PAIRS, num_tokens, dim))]
    if storage == "bf16":
        return [TensorSpec("tokens", "bfloat16", (PAIRS, num_tokens, dim))]
    scales = (
        TensorSpec("scales", "float32", (PAIRS, num_tokens))
        if storage == "int8"
        else TensorSpec("scales", "float16", (PAIRS, num_tokens, dim // INT4_GROUP))
    )
    return [TensorSpec("tokens", "uint8", (PAIRS, layout.token_bytes)), scales]


def _states(config: EdjeConfig, precision: Precision) -> TensorSpec:
    return TensorSpec("states", PRECISION_TYPES[precision], (QUERIES, TEXT_TOKENS, config.joint.dim))

"""Converts a bfloat16 graph to a float32 graph that rounds every result to bfloat16. ONNX Runtime on a CPU needs it,
because it has no bfloat16 arithmetic.

Each operator computes in float32 and its result is rounded once, like a GPU's bfloat16 kernels. A plan with fused
operators rounds less often. Weights are widened without loss. Knows ONNX only.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

#: Operators that move values without computing: rounded inputs give rounded outputs.
_MOVES = {"Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
_SUFFIX = "/unrounded"


def has_bfloat16(model: ModelProto) -> bool:
    """Whether any value in the graph is bfloat16."""
    return any(each == TensorProto.BFLOAT16 for each in _types(model.graph).values())


def round_to_bfloat16(model: ModelProto) -> ModelProto:
    """Return the graph with float32 instead of bfloat16, and a rounding after every operator that computed in bfloat16.

    Inputs and outputs in bfloat16 become float32 too.
    """
    graph = model.graph
    narrow = {name for name, elem_type in _types(graph).items() if elem_type == TensorProto.BFLOAT16}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _rounded(node, narrow)
    values = [*graph.input, *graph.output]
    for value in values:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    weights = [_widened(each) for each in graph.initializer]
    wide = helper.make_graph(nodes, graph.name, graph.input, graph.output, weights)
    return helper.make_model(wide, opset_imports=model.opset_import, ir_version=model.ir_version)


def _types(graph: GraphProto) -> dict[str, int]:
    """Return the element type of every value, by name."""
    values = [*graph.input, *graph.output, *graph.value_info]
    return {each.name: each.type.tensor_type.elem_type for each in values} | {
        each.name: each.data_type for each in graph.initializer
    }


def _rounded(node: NodeProto, narrow: set[str]) -> list[NodeProto]:
    wide = NodeProto()
    wide.CopyFrom(node)
    for attribute in wide.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        elif attribute.type == onnx.AttributeProto.TENSOR:
            attribute.t.CopyFrom(_widened(attribute.t))
    if node.op_type in _MOVES:
        return [wide]
    after = []
    for index, name in enumerate(node.output):
        if name in narrow:
            wide.output[index] = f"{name}{_SUFFIX}"
            half = f"{name}/rounded"
            after.append(helper.make_node("Cast", [wide.output[index]], [half], to=TensorProto.BFLOAT16))
            after.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    return [wide, *after]


def _widened(tensor: TensorProto) -> TensorProto:
    if tensor.data_type != TensorProto.BFLOAT16:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)

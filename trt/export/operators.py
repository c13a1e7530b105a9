"""Checks that TensorRT's ONNX parser supports every operator of a graph with the types of its inputs.

The table lists the operators that these models and their vision towers may use, from docs/operators.md of the
repository onnx/onnx-tensorrt for TensorRT 10.15, the newest version that could be read. The parser of TensorRT 11.4 is
newer; its own errors decide when a plan is built. Knows ONNX, and nothing of TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, shape_inference

from trt.contract import EngineError

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ALL = _NUMBERS | {"BOOL"}
_BOOL = frozenset({"BOOL"})

#: Input types of each operator. uint8 is allowed only as a network input that is cast at once.
SUPPORTED: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sign", "Mod", "Pow", "Min", "Max", "Mean", "Sum"), _NUMBERS
    ),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), _NUMBERS),
    **dict.fromkeys(("And", "Or", "Not", "Xor"), _BOOL),
    **dict.fromkeys(("MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose"), _FLOATS),
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "InstanceNormalization"), _FLOATS),
    **dict.fromkeys(("BatchNormalization", "RMSNormalization", "LpNormalization", "Softmax", "LogSoftmax"), _FLOATS),
    **dict.fromkeys(
        ("Erf", "Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "Exp", "Log", "Sqrt", "Reciprocal"), _FLOATS
    ),
    **dict.fromkeys(("Floor", "Ceil", "Round", "Sin", "Cos", "Clip", "Elu", "LeakyRelu", "PRelu", "Softplus"), _FLOATS),
    **dict.fromkeys(("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "IsInf"), _FLOATS),
    **dict.fromkeys(("Gelu", "Relu", "IsNaN", "Range", "Pad", "TopK", "ArgMax", "ArgMin", "DepthToSpace"), _NUMBERS),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd"), _NUMBERS),
    **dict.fromkeys(("Reshape", "Transpose", "Concat", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten"), _ALL),
    **dict.fromkeys(("Expand", "Tile", "Gather", "GatherElements", "GatherND", "Where", "Identity", "Trilu"), _ALL),
    **dict.fromkeys(("Shape", "Size", "Constant", "ConstantOfShape"), _ALL),
    "Cast": _ALL | {"UINT8"},
    "CumSum": _FLOATS,
    "Resize": _FLOATS,
    "ScatterND": _NUMBERS,
}
#: Inputs that hold indices, counts or axes have integer types, independent of the operator's number type.
_INDICES = frozenset({"INT32", "INT64"})
_INDEX_INPUTS = {"Pad": (1, 3), "TopK": (1,), "CumSum": (1,), "Resize": (3,)}


class OperatorUnsupported(EngineError):
    """TensorRT's parser does not support a node of the graph; the message names the node and its operator."""


@dataclass(frozen=True, slots=True)
class Use:
    """One node: its name, its operator (with the domain, if it is not ONNX's) and its input types ("" if unknown)."""

    node: str
    operator: str
    types: tuple[str, ...]


def unsupported(uses: list[Use]) -> Iterator[tuple[Use, str]]:
    """Yield every use that the table does not allow, with the reason."""
    for use in uses:
        allowed = SUPPORTED.get(use.operator)
        if allowed is None:
            yield use, "is not on the parser's list"
            continue
        indices = _INDEX_INPUTS.get(use.operator, ())
        wrong = [
            kind or "an unknown type"
            for number, kind in enumerate(use.types)
            if kind not in (_INDICES if number in indices else allowed)
        ]
        if wrong:
            yield use, f"does not accept {', '.join(dict.fromkeys(wrong))}"


def uses_in(path: Path) -> list[Use]:
    """Return the nodes of an ONNX file, without those in functions and branches, which exported graphs do not have."""
    model = shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    graph = model.graph
    types = {each.name: each.data_type for each in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return [
        Use(
            node.name,
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
            tuple(TensorProto.DataType.Name(types[name]) if name in types else "" for name in node.input if name),
        )
        for node in graph.node
    ]


def check_operators(path: Path) -> None:
    """Raise `OperatorUnsupported` for a file that TensorRT's parser cannot read."""
    wrong = [f"{use.operator} (node {use.node!r}) {why}" for use, why in unsupported(uses_in(path))]
    if wrong:
        named = "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise OperatorUnsupported(
            f"TensorRT cannot parse {path.name}: {named}: "
            "serve this model with the torch engine, or give it another tower"
        )

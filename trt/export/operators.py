"""Whether TensorRT's ONNX parser takes every operator of a graph, in the types that it is used with.

The table is the part that these models, and vision towers like theirs, can come to need of the parser's own list: its
docs/operators.md in the repository onnx/onnx-tensorrt, as of TensorRT 10.15, the newest that could be read; 11.4's
parser is newer, and its own errors have the last word when a plan is built.
Knows ONNX, and nothing of TensorRT.
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

#: Types that an operator takes. uint8 is one only at the network's border, and only in order to be cast.
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
#: Inputs that say where, how many or which way have a type of their own, whatever the operator computes in.
_INDICES = frozenset({"INT32", "INT64"})
_INDEX_INPUTS = {"Pad": (1, 3), "TopK": (1,), "CumSum": (1,), "Resize": (3,)}


class OperatorUnsupported(EngineError):
    """A graph holds what TensorRT's parser does not take; the message names the node and its operator."""


@dataclass(frozen=True, slots=True)
class Use:
    """One node: its name, its operator with a foreign domain before it, and its inputs' types ("" if unknown)."""

    node: str
    operator: str
    types: tuple[str, ...]


def unsupported(uses: list[Use]) -> Iterator[tuple[Use, str]]:
    """Every use that the table does not allow, and why."""
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
            yield use, f"does not take {', '.join(dict.fromkeys(wrong))}"


def uses_in(path: Path) -> list[Use]:
    """The nodes of an ONNX file, those inside of functions and branches aside: exported graphs have neither."""
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
    """Raise `OperatorUnsupported` for a file that TensorRT's parser would not take."""
    wrong = [f"{use.operator} (node {use.node!r}) {why}" for use, why in unsupported(uses_in(path))]
    if wrong:
        named = "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise OperatorUnsupported(
            f"TensorRT cannot parse {path.name}: {named}: "
            "serve this model with the torch engine, or give it another tower"
        )

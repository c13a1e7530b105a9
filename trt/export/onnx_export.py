"""Exports a checkpoint to the ONNX graphs from which TensorRT builds plans and which ONNX Runtime runs.

The dimensions named in `trt.graphs` are dynamic, all others fixed. Weights and casts set the precision of every step.
Knows nothing of plans.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxscript.optimizer
import torch
from onnx import TensorProto
from torch import Tensor, nn

from edje.config import EdjeConfig
from edje.model.edje import Edje
from edje.model.weights import Checkpoint
from edje.towers.base import onnx_graph
from trt.contract import EngineError
from trt.export.modules import (
    DTYPES,
    ImagePart,
    NormalisedPixels,
    PairPart,
    QueryPart,
    TokensOfPatches,
    attend,
    to_precision,
)
from trt.export.tower_insertion import gives_pooled, insert_tower
from trt.graphs import IMAGES, TEXT_TOKENS, GraphName, GraphSpec, Precision, TensorSpec, graphs_of
from trt.slab.layout import SlotLayout

#: The first opset whose Conv accepts bfloat16; TensorRT reads opsets 9 to 24.
OPSET = 22
#: A graph with more bytes keeps its weights in a second file: protobuf is limited to 2 GiB.
MAX_INLINE_BYTES = 1_900_000_000

#: Constants up to this number of bytes are folded.
_FOLDED_BYTES = 1 << 31
#: Sizes for tracing: all different, none a size of a model, none 0 or 1, which tracing treats as constants.
_TRACED_SIZES = {"images": 3, "queries": 5, "text_tokens": 11, "pairs": 7}
_SILENCED_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.__trace")
_TORCH_TYPES = {
    "uint8": torch.uint8,
    "int32": torch.int32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class ExportFailed(EngineError):
    """A model cannot be written as ONNX graphs; the message says which part of it and why."""


def export_graph(
    name: GraphName, checkpoint: Checkpoint, directory: Path, *, storage: str, precision: Precision
) -> Path:
    """Write `<name>.onnx` and return its path.

    A graph of more than `MAX_INLINE_BYTES` keeps its weights in `<name>.onnx.data`. The checkpoint's model is not
    changed. Raises `ExportFailed`, and `EngineUnavailable` for a storage type that the tokens do not fit.
    """
    config, vision = checkpoint.config, checkpoint.model.vision
    spec = graphs_of(config, storage, precision)[name]
    tower = onnx_graph(vision)
    kept = {} if tower is None else {id(vision): vision}  # not copied: an ONNX Runtime session, which never changes
    model = to_precision(copy.deepcopy(checkpoint.model, kept), precision).eval()
    path = directory / f"{name}.onnx"
    if name == "image" and tower is not None:
        graph = _graph_with_tower(tower, model, spec, config)
        onnx.save(
            graph, str(path), save_as_external_data=graph.ByteSize() > MAX_INLINE_BYTES, location=f"{path.name}.data"
        )
    else:
        layout = SlotLayout(storage, config.adapter.num_tokens, config.joint.dim)
        part = _part(name, model, layout, precision)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in part.state_dict().values())
        _export(part, spec, config).save(path, external_data=num_bytes > MAX_INLINE_BYTES)
    check_graph(path, spec)
    return path


def _part(name: GraphName, model: Edje, layout: SlotLayout, precision: Precision) -> nn.Module:
    if name == "image":
        return ImagePart(model)
    return QueryPart(model, DTYPES[precision]) if name == "query" else PairPart(model, layout)


def _graph_with_tower(tower: bytes, model: Edje, spec: GraphSpec, config: EdjeConfig) -> onnx.ModelProto:
    """Return the image graph of a model whose tower is an ONNX graph: normalisation, the tower, the adapter."""
    vision, [pixels] = config.vision, spec.inputs
    normalised = TensorSpec("normalised", "float32", pixels.shape)
    patches = TensorSpec("patches", "float32", (IMAGES, vision.num_tokens(config.preprocess.image_size), vision.dim))
    pooled = TensorSpec("tower_pooled", "float32", (IMAGES, vision.pooled_dim))
    between = (patches, pooled) if gives_pooled(tower) else (patches,)
    before = _export(NormalisedPixels(model), GraphSpec(spec.name, spec.inputs, (normalised,)), config)
    after = _export(TokensOfPatches(model), GraphSpec(spec.name, between, spec.outputs), config)
    try:
        return insert_tower(
            tower,
            before.model_proto,
            after.model_proto,
            pixels=normalised.name,
            patches=patches.name,
            pooled=pooled.name,
        )
    except Exception as error:  # ONNX's converter and composer have no common base error
        raise ExportFailed(
            f"the vision tower's ONNX graph cannot be inserted into the image graph: {_first_line(error)}: "
            "serve this model with the torch engine, or give it another tower"
        ) from error


def _export(part: nn.Module, spec: GraphSpec, config: EdjeConfig) -> torch.onnx.ONNXProgram:
    largest = {TEXT_TOKENS: config.preprocess.max_text_tokens}  # there are no positions for longer texts
    dimensions = {name: torch.export.Dim(name, min=1, max=largest.get(name)) for name in spec.dimensions}
    shapes = {
        tensor.name: {axis: dimensions[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    }
    try:
        with torch.no_grad(), _quiet():
            traced = torch.export.export(
                part.eval(), (), {each.name: _example(each) for each in spec.inputs}, dynamic_shapes=shapes
            )
            program = torch.onnx.export(
                traced.run_decompositions({torch.ops.aten.scaled_dot_product_attention.default: attend}),
                input_names=[each.name for each in spec.inputs],
                output_names=[each.name for each in spec.outputs],
                dynamic_shapes=shapes,  # only for the names of the dimensions
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None  # it is None only if a file name was given
            # Limits above the exporter's defaults, so that a cast or sliced weight replaces the large original.
            onnxscript.optimizer.optimize(
                program.model, input_size_limit=_FOLDED_BYTES, output_size_limit=_FOLDED_BYTES
            )
    except Exception as error:  # torch's tracer, translator and optimiser have no common base error
        raise ExportFailed(f"the {spec.name} part of the model cannot be exported: {_first_line(error)}") from error
    _cast_bytes_first(program.model.graph)
    return program


def _cast_bytes_first(graph: Any) -> None:
    """Let every reader of a uint8 input, also of its shape alone, read its cast: TensorRT allows only the cast."""
    for value in graph.inputs:
        if value.dtype.name == "UINT8":
            cast = next(node for node, _ in value.uses() if node.op_type == "Cast")
            for node, index in list(value.uses()):
                if node is not cast:
                    node.replace_input_with(index, cast.outputs[0])
            first = next(iter(graph))
            if first is not cast:
                graph.remove(cast)
                graph.insert_before(first, cast)


def check_graph(path: Path, spec: GraphSpec) -> None:
    """Raise `ExportFailed` unless the file is valid ONNX with this specification's inputs and outputs.

    This finds a dimension that tracing has fixed by mistake.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportFailed(f"{path} is not valid ONNX: {_first_line(error)}") from error
    graph = onnx.load(str(path), load_external_data=False).graph
    found = [tuple(map(_spec_of, each)) for each in (graph.input, graph.output)]
    if found != [spec.inputs, spec.outputs]:
        raise ExportFailed(f"the {spec.name} graph was exported with {found}, expected {[spec.inputs, spec.outputs]}")


def _spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = {"FLOAT": "float32"}.get(kind := TensorProto.DataType.Name(tensor.elem_type), kind.lower())
    return TensorSpec(value.name, dtype, tuple(each.dim_param or each.dim_value for each in tensor.shape.dim))


def _example(tensor: TensorSpec) -> Tensor:
    """Return an input for tracing: ones are valid token ids, lengths and query numbers."""
    return torch.ones(tensor.sized(_TRACED_SIZES), dtype=_TORCH_TYPES[tensor.dtype])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log lines, which do not concern the model."""
    loggers = [logging.getLogger(name) for name in _SILENCED_LOGGERS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"

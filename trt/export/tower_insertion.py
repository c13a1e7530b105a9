"""Inserts a vision tower that is an ONNX graph between two exported graphs: pixel normalisation and the adapter.

The tower's operators and types are kept, except that quantised weights are unpacked to float32, because TensorRT
supports only some forms of quantisation. Knows ONNX, and nothing of torch.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import compose, numpy_helper, utils, version_converter
from onnx.reference import ReferenceEvaluator

_PREFIX = "tower/"
_KEEP_INTERFACE = {"rename_inputs": False, "rename_outputs": False}
TOKENS, POOLED = "tokens", "pooled"


def gives_pooled(tower: bytes) -> bool:
    """Whether the outputs of the graph include an embedding of the whole image."""
    return any(output.name == POOLED for output in onnx.load_model_from_string(tower).graph.output)


def insert_tower(
    tower: bytes, before: onnx.ModelProto, after: onnx.ModelProto, *, pixels: str, patches: str, pooled: str
) -> onnx.ModelProto:
    """Return one graph of `before`, whose output `pixels` is the tower's input, the tower, and `after`.

    `after` reads the tower's tokens as `patches` and its pooled embedding, if it has one, as `pooled`. The tower is
    converted to the opset of `before` and `after`. Raises ONNX's own errors for a tower that cannot be converted.
    """
    [opset] = [each.version for each in before.opset_import if not each.domain]
    middle = _of_opset(_used_part(_unpacked(onnx.load_model_from_string(tower))), opset)
    [taken] = [each.name for each in middle.graph.input]
    given = {output.name for output in middle.graph.output}
    passed = [(TOKENS, patches), (POOLED, pooled)]
    # Prefixes, because the three graphs may use the same names for inner values.
    middle = compose.add_prefix(middle, _PREFIX)
    before = compose.add_prefix(before, "before/", **_KEEP_INTERFACE)
    after = compose.add_prefix(after, "after/", **_KEEP_INTERFACE)
    before.ir_version = middle.ir_version = after.ir_version
    fed = compose.merge_models(before, middle, io_map=[(pixels, _PREFIX + taken)])
    return compose.merge_models(
        fed, after, io_map=[(_PREFIX + name, to) for name, to in passed if name in given], producer_name="edje"
    )


def _unpacked(tower: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the tower's quantised weights by float32 weights."""
    graph = tower.graph
    opsets = {each.domain: each.version for each in tower.opset_import}
    weights = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in list(graph.node):
        taken = [name for name in node.input if name]  # an empty name is an absent input, such as the zero point
        if node.op_type == "DequantizeLinear" and set(taken) <= weights.keys():
            [values] = ReferenceEvaluator(node, opsets=opsets).run(None, {name: weights[name] for name in taken})
            graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), node.output[0]))
            graph.node.remove(node)
    return tower


def _used_part(tower: onnx.ModelProto) -> onnx.ModelProto:
    """Return the tower with the used outputs only, and without names of dimensions, which could clash with others."""
    weights = {each.name for each in tower.graph.initializer}  # old graphs list weights as inputs
    taken = [each.name for each in tower.graph.input if each.name not in weights]
    given = [each.name for each in tower.graph.output if each.name in (TOKENS, POOLED)]
    alone = utils.Extractor(tower).extract_model(taken, given)
    del alone.graph.value_info[:]
    return alone


def _of_opset(tower: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    if all(each.version == opset for each in tower.opset_import if not each.domain):
        return tower
    return version_converter.convert_version(tower, opset)

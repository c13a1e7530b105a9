"""Puts a vision tower that is an ONNX graph itself between two exported graphs: pixels before it, the adapter after.

Its operators stay as they are, in the types they have, but for weights stored in fewer bits, which are unpacked: of
those TensorRT takes only some forms. Knows ONNX, and nothing of torch.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import compose, numpy_helper, utils, version_converter
from onnx.reference import ReferenceEvaluator

_PREFIX = "tower/"
_OWN_NAMES = {"rename_inputs": False, "rename_outputs": False}
TOKENS, POOLED = "tokens", "pooled"


def gives_pooled(tower: bytes) -> bool:
    """Whether the graph has an embedding of the whole image among its outputs."""
    return any(output.name == POOLED for output in onnx.load_model_from_string(tower).graph.output)


def around(
    tower: bytes, before: onnx.ModelProto, after: onnx.ModelProto, *, pixels: str, patches: str, pooled: str
) -> onnx.ModelProto:
    """One graph: `before`, whose output `pixels` the tower takes, then the tower, then `after`.

    `after` takes the tower's tokens as `patches` and its pooled embedding, if it has one, as `pooled`. Both are of the
    opset that the tower is brought to. Raises whatever ONNX raises for a tower that cannot be.
    """
    [opset] = [each.version for each in before.opset_import if not each.domain]
    middle = _of_opset(_alone(_unpacked(onnx.load_model_from_string(tower))), opset)
    [taken] = [each.name for each in middle.graph.input]
    given = {output.name for output in middle.graph.output}
    passed = [(TOKENS, patches), (POOLED, pooled)]
    # All three name their inner values as they like.
    middle = compose.add_prefix(middle, _PREFIX)
    before = compose.add_prefix(before, "before/", **_OWN_NAMES)
    after = compose.add_prefix(after, "after/", **_OWN_NAMES)
    before.ir_version = middle.ir_version = after.ir_version
    fed = compose.merge_models(before, middle, io_map=[(pixels, _PREFIX + taken)])
    return compose.merge_models(
        fed, after, io_map=[(_PREFIX + name, to) for name, to in passed if name in given], producer_name="edje"
    )


def _unpacked(tower: onnx.ModelProto) -> onnx.ModelProto:
    """The tower with its quantised weights as float32."""
    graph = tower.graph
    opsets = {each.domain: each.version for each in tower.opset_import}
    weights = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in list(graph.node):
        taken = [name for name in node.input if name]  # one without a name is left out: there may be no zero point
        if node.op_type == "DequantizeLinear" and set(taken) <= weights.keys():
            [values] = ReferenceEvaluator(node, opsets=opsets).run(None, {name: weights[name] for name in taken})
            graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), node.output[0]))
            graph.node.remove(node)
    return tower


def _alone(tower: onnx.ModelProto) -> onnx.ModelProto:
    """The tower with the outputs that are used, and without names for sizes, which would meet others' names."""
    weights = {each.name for each in tower.graph.initializer}  # old graphs name them among their inputs
    taken = [each.name for each in tower.graph.input if each.name not in weights]
    given = [each.name for each in tower.graph.output if each.name in (TOKENS, POOLED)]
    alone = utils.Extractor(tower).extract_model(taken, given)
    del alone.graph.value_info[:]
    return alone


def _of_opset(tower: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    if all(each.version == opset for each in tower.opset_import if not each.domain):
        return tower
    return version_converter.convert_version(tower, opset)

"""Small vision towers as ONNX graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edje.tower_config import OnnxVisionConfig

#: The configuration of `patch_graph` for a weight of (8, 3, 4, 4) and images of 16 pixels.
GRAPH = OnnxVisionConfig(dim=8, tokens_per_image=16, pooled_dim=8, num_heads=2)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patch_graph(weight, *, has_pooled=False, inputs=("N", 3, 16, 16), tokens="tokens"):
    """A convolution of patches as an ONNX graph; the pooled embedding is the largest value of each channel."""
    onnx = pytest.importorskip("onnx")  # neither is needed by a service that has no such tower
    pytest.importorskip("onnxruntime")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    dim, _, stride, _ = weight.shape
    nodes = [
        helper.make_node("Conv", ["pixels", "weight"], ["grid"], strides=[stride, stride]),
        helper.make_node("Reshape", ["grid", "shape"], ["rows"]),
        helper.make_node("Transpose", ["rows"], [tokens], perm=[0, 2, 1]),
    ]
    outputs = [helper.make_tensor_value_info(tokens, floats, ["N", None, dim])]
    if has_pooled:
        nodes.append(helper.make_node("ReduceMax", ["rows"], ["pooled"], axes=[2], keepdims=0))
        outputs.append(helper.make_tensor_value_info("pooled", floats, ["N", dim]))
    graph = helper.make_graph(
        nodes,
        "patches",
        [helper.make_tensor_value_info("pixels", floats, list(inputs))],
        outputs,
        [
            onnx.numpy_helper.from_array(weight.numpy(), "weight"),
            onnx.numpy_helper.from_array(np.array([0, dim, -1]), "shape"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

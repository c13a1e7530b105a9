"""A vision tower in ONNX format becomes part of the image graph; its outputs do not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from edje.config import AdapterConfig, PreprocessConfig
from edje.model.edje import build_edje
from edje.model.initialisation import initialise_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint, save_checkpoint
from edje.vocabulary import character_tokenizer
from engine_directories import FIRST_LIMIT_S
from graph_towers import GRAPH, noise, patch_graph
from trt.export.onnx_export import ExportFailed, export_graph
from trt.export.operators import OperatorUnsupported, check_operators, uses_in
from trt.graphs import GRAPH_NAMES

pytestmark = pytest.mark.timeout(FIRST_LIMIT_S)


def plain():
    return patch_graph(noise(8, 3, 4, 4))


def with_pooled():
    return patch_graph(noise(8, 3, 4, 4), has_pooled=True)


def with_packed_weights():
    """In bytes that are not symmetric about zero, which TensorRT does not unpack."""
    graph = plain()
    [weight] = [each for each in graph.graph.initializer if each.name == "weight"]
    scale, zero = np.float32(0.03), np.uint8(120)
    packed = np.clip(np.round(numpy_helper.to_array(weight) / scale) + zero, 0, 255).astype(np.uint8)
    graph.graph.initializer.remove(weight)
    for name, value in (("packed", packed), ("scale", scale), ("zero", zero)):
        graph.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    graph.graph.node.insert(0, helper.make_node("DequantizeLinear", ["packed", "scale", "zero"], ["weight"]))
    return graph


def with_packed_weights_and_no_zero_point():
    graph = with_packed_weights()
    graph.graph.node[0].input[2] = ""
    return graph


def with_more_outputs_and_weights_among_its_inputs():
    graph = plain()
    graph.graph.output.append(helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["N", 8, 16]))
    [weight] = [each for each in graph.graph.initializer if each.name == "weight"]
    graph.graph.input.append(helper.make_tensor_value_info("weight", weight.data_type, list(weight.dims)))
    return graph


def checkpoint_of(tower, folder):
    config = replace(
        VARIANTS["tiny"],
        vision=GRAPH,
        preprocess=PreprocessConfig(image_size=16),
        adapter=AdapterConfig(kind="compression", num_tokens=4, hidden_dim=16),
    )
    model = build_edje(config, graph=tower.SerializeToString())
    initialise_untrained(model, seed=0)
    save_checkpoint(folder, config, model, character_tokenizer().to_str())
    return load_checkpoint(folder)


@pytest.mark.parametrize("tower", [plain, with_pooled, with_packed_weights, with_packed_weights_and_no_zero_point])
def test_the_image_graph_gives_the_models_tokens_at_any_number_of_images(tower, tmp_path):
    checkpoint = checkpoint_of(tower(), tmp_path / "model")

    path = export_graph("image", checkpoint, tmp_path, storage="int8", precision="fp32")

    check_operators(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for number in (1, 2, 5):
        pixels = torch.from_numpy(np.random.default_rng(number).integers(0, 256, (number, 3, 16, 16), np.uint8))
        with torch.no_grad():
            expected = checkpoint.model.encode_images(pixels)
        for found, right in zip(session.run(["tokens", "pooled"], {"pixels": pixels.numpy()}), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-3)


def test_in_half_precision_the_tower_keeps_its_own_types(tmp_path):
    checkpoint = checkpoint_of(with_pooled(), tmp_path / "model")

    path = export_graph("image", checkpoint, tmp_path, storage="int8", precision="bf16")

    check_operators(path)
    types = {use.operator: set(use.types) for use in uses_in(path)}
    assert types["Conv"] == {"FLOAT"}
    assert types["MatMul"] | types.get("Gemm", set()) == {"BFLOAT16"}


def test_unused_outputs_of_the_tower_are_left_out(tmp_path):
    checkpoint = checkpoint_of(with_more_outputs_and_weights_among_its_inputs(), tmp_path / "model")

    path = export_graph("image", checkpoint, tmp_path, storage="int8", precision="fp32")

    graph = onnx.load(path).graph
    assert [each.name for each in graph.input] == ["pixels"]
    assert [each.name for each in graph.output] == ["tokens", "pooled"]


def test_every_graph_of_a_model_with_an_onnx_tower_is_exported(tmp_path):
    checkpoint = checkpoint_of(plain(), tmp_path / "model")
    tower = checkpoint.model.vision

    paths = [export_graph(name, checkpoint, tmp_path, storage="int4", precision="fp16") for name in GRAPH_NAMES]

    assert [path.name for path in paths] == ["image.onnx", "query.onnx", "pair.onnx"]
    assert checkpoint.model.vision is tower


def test_a_tower_with_operators_of_another_domain_is_reported_as_unsupported_by_tensorrt(tmp_path):
    graph = plain()
    graph.graph.node[-1].output[0] = "before"
    graph.graph.node.append(helper.make_node("Gelu", ["before"], ["tokens"], domain="com.microsoft"))
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    checkpoint = checkpoint_of(graph, tmp_path / "model")

    path = export_graph("image", checkpoint, tmp_path, storage="int8", precision="fp32")
    with pytest.raises(OperatorUnsupported, match=r"com\.microsoft::Gelu.*give it another tower"):
        check_operators(path)


def test_a_tower_that_cannot_be_converted_to_the_opset_is_refused_with_a_remedy(tmp_path, monkeypatch):
    checkpoint = checkpoint_of(plain(), tmp_path / "model")

    def refuse(*_):
        raise RuntimeError("no adapter")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)

    with pytest.raises(ExportFailed, match=r"ONNX graph cannot be inserted.*no adapter.*the torch engine"):
        export_graph("image", checkpoint, tmp_path, storage="int8", precision="fp32")

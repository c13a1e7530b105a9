"""The exported graphs of a checkpoint: their content, and that no open dimension is fixed."""

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, shape_inference
from torch import nn
from torch.nn import functional

import trt.export.onnx_export
from edje.model.weights import load_checkpoint
from engine_directories import FIRST_LIMIT_S, KINDS, sample
from trt.export.modules import Float32Norm, attend, stored_to_tokens
from trt.export.onnx_export import ExportFailed, check_graph, export_graph
from trt.export.operators import check_operators
from trt.graphs import GRAPH_NAMES, graphs_of
from trt.manifest import read_manifest
from trt.slab.layout import STORAGES, SlotLayout
from trt.slab.torch_slab import dequantize

pytestmark = pytest.mark.timeout(FIRST_LIMIT_S)

PRECISE = {"LayerNormalization", "GroupNormalization", "Softmax", "Tanh", "ReduceL2"}


@pytest.fixture(params=list(KINDS), scope="module")
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def made(tmp_path_factory, kind):
    return sample(tmp_path_factory, kind)


def graph(made, name):
    model = onnx.load(made.engine / f"{name}.onnx")
    return shape_inference.infer_shapes(model).graph


def types_of(graph):
    values = [*graph.input, *graph.value_info, *graph.output]
    return {each.name: TensorProto.DataType.Name(each.type.tensor_type.elem_type) for each in values} | {
        each.name: TensorProto.DataType.Name(each.data_type) for each in graph.initializer
    }


def nodes_of(made, *operators):
    return [(name, node) for name in GRAPH_NAMES for node in graph(made, name).node if node.op_type in operators]


def test_every_operator_and_type_is_on_the_parsers_list(made):
    for name in GRAPH_NAMES:
        check_operators(made.engine / f"{name}.onnx")


def test_inputs_and_outputs_are_as_specified(made):
    specs = graphs_of(config_of(made), made.options.storage, made.options.precision)

    for name in GRAPH_NAMES:
        check_graph(made.engine / f"{name}.onnx", specs[name])


def config_of(made):
    return read_manifest(made.engine).config


def test_norms_softmax_and_the_head_are_in_float32(made):
    for name in GRAPH_NAMES:
        part = graph(made, name)
        types = types_of(part)

        assert {
            types[each] for node in part.node if node.op_type in PRECISE for each in node.input if each in types
        } <= {
            "FLOAT",
            "INT64",
        }


def test_the_layers_multiply_in_the_precision_asked_for(made):
    expected = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}[made.options.precision]
    part = graph(made, "image")
    types = types_of(part)

    assert {types[node.input[0]] for node in part.node if node.op_type in ("MatMul", "Gemm", "Conv")} == {expected}


def test_nothing_of_training_and_nothing_that_hides_a_nan_is_in_a_graph(made):
    assert nodes_of(made, "Dropout", "RandomNormal", "BatchNormalization") == []
    assert nodes_of(made, "IsNaN", "IsInf") == []


def test_words_are_in_the_query_graph_alone(made):
    vocab_size = config_of(made).joint.vocab_size

    with_words = [name for name in GRAPH_NAMES for each in graph(made, name).initializer if vocab_size in each.dims]

    assert with_words == ["query"]


def test_the_last_layer_computes_for_cls_alone(made):
    part = graph(made, "pair")
    shapes = {
        each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in part.value_info
    }

    widened = [shapes[node.output[0]] for node in part.node if node.op_type == "Gelu"]

    lengths = [shape[1] for shape in widened if len(shape) == 3]
    assert len(lengths) == config_of(made).joint.num_layers
    assert lengths[-1:] in ([1], [])
    assert 1 not in lengths[:-1]


def test_no_weight_is_stored_twice_and_none_unused(made):
    for name in GRAPH_NAMES:
        part = graph(made, name)
        used = set(itertools.chain.from_iterable(node.input for node in part.node))

        assert {each.name for each in part.initializer} <= used


def test_a_dimension_that_tracing_fixed_is_found(made):
    specs = graphs_of(config_of(made), made.options.storage, made.options.precision)
    fixed = replace(specs["query"], inputs=(replace(specs["query"].inputs[0], shape=(5, "text_tokens")),))

    with pytest.raises(ExportFailed, match="the query graph was exported with"):
        check_graph(made.engine / "query.onnx", fixed)


def test_an_invalid_onnx_file_is_reported(tmp_path):
    model = helper.make_model(helper.make_graph([helper.make_node("Add", ["a"], ["b"])], "broken", [], []))
    onnx.save(model, tmp_path / "pair.onnx")

    with pytest.raises(ExportFailed, match="is not valid ONNX"):
        check_graph(tmp_path / "pair.onnx", graphs_of(KINDS["full"][0], "int8", "fp32")["pair"])


def test_the_error_for_a_model_that_cannot_be_traced_names_the_part(tmp_path_factory, tmp_path, monkeypatch):
    class Branching(nn.Module):
        def forward(self, text_ids, text_lengths):
            return text_ids if text_lengths.sum() > 3 else text_lengths

    checkpoint = load_checkpoint(sample(tmp_path_factory, "full").checkpoint)  # may export graphs of its own
    monkeypatch.setattr(trt.export.onnx_export, "_part", lambda *_: Branching())

    with pytest.raises(ExportFailed, match="the query part of the model cannot be exported"):
        export_graph("query", checkpoint, tmp_path, storage="int8", precision="fp32")


def test_weights_of_a_large_model_lie_beside_its_graph(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setattr(trt.export.onnx_export, "MAX_INLINE_BYTES", 1000)
    checkpoint = load_checkpoint(sample(tmp_path_factory, "full").checkpoint)

    path = export_graph("query", checkpoint, tmp_path, storage="int8", precision="fp16")

    beside = tmp_path / "query.onnx.data"
    assert path.stat().st_size < 100_000 < beside.stat().st_size
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [states] = session.run(None, {"text_ids": np.ones((1, 3), np.int32), "text_lengths": np.array([3], np.int32)})
    assert (states.shape, states.dtype) == ((1, 3, 64), np.float16)
    assert np.abs(states).max() > 0
    assert {each.dtype for each in checkpoint.model.parameters()} == {torch.float32}  # the checkpoint stays as it was


@pytest.mark.parametrize("storage", STORAGES)
def test_stored_bytes_become_the_tokens_that_the_torch_engine_sees(storage):
    layout = SlotLayout(storage, 3, 64)
    random = np.random.default_rng(0)
    raw = torch.from_numpy(random.integers(0, 256, (5, layout.token_bytes), dtype=np.uint8))
    scales = torch.from_numpy(random.random((5, layout.scale_bytes // (4 if storage == "int8" else 2) or 1)))
    typed = scales.to(torch.float32 if storage == "int8" else torch.float16)
    expected = dequantize(layout, raw, typed.view(torch.uint8))
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(storage)

    if half is not None:
        found = stored_to_tokens(layout, raw.view(half).view(5, 3, 64), None)
    else:
        found = stored_to_tokens(layout, raw, typed.view(5, 3, *((2,) if storage == "int4" else ())))

    np.testing.assert_array_equal(found.numpy(), expected.numpy())


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_attention_in_steps_is_attention(mask):
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 4, 5, 8) for _ in range(3))
    seen = torch.arange(5) < torch.tensor([[5], [3]])
    given = {"none": None, "bool": seen[:, None, None, :], "added": torch.randn(2, 1, 5, 5)}[mask]

    found = attend(queries, keys, values, given)

    expected = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=given)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_masked_tokens_have_no_weight_and_a_nan_is_kept():
    queries = keys = torch.zeros(1, 1, 2, 4)
    values = torch.tensor([[1.0], [1e30]]).expand(1, 1, 2, 1)
    mask = torch.tensor([True, False])[None, None, None, :]

    assert attend(queries, keys, values, mask).unique().tolist() == [1.0]
    assert attend(queries + torch.nan, keys, values, mask).isnan().all()


@pytest.mark.parametrize("unknown", [{"dropout_p": 0.1}, {"is_causal": True}, {"enable_gqa": True}])
def test_attention_of_a_kind_that_no_model_here_has_is_refused(unknown):
    with pytest.raises(ValueError, match="served without"):
        attend(*(torch.zeros(1, 1, 2, 4) for _ in range(3)), **unknown)


def test_a_norm_between_half_precision_layers_sums_in_float32():
    hidden = torch.full((1, 4096), 300.0, dtype=torch.float16)
    hidden[0, ::2] = -300.0

    found = Float32Norm(nn.LayerNorm(4096).half())(hidden)

    assert found.dtype == torch.float16
    torch.testing.assert_close(found.abs().float(), torch.ones(1, 4096), atol=1e-3, rtol=0)

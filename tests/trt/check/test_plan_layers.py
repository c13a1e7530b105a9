"""The layers of a plan, as written by TensorRT's inspector."""

import json

import pytest

from trt.check.plan_layers import LayersUnreadable, attention_in, read_layers

FUSED = {"Name": "_gemm_mha_v2_myl0_5", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x7d3"}
SOFTMAX = {"Name": "__myl_MaxSubExpSumDivMul_myl0_4", "LayerType": "kgen", "TacticName": "__myl_Softmax_0x12"}
GEMM = {"Name": "node_MatMul_3", "LayerType": "gemm", "TacticName": "sm90_xmma_gemm_bf16"}


def layers(tmp_path, *each):
    path = tmp_path / "pair.layers.json"
    path.write_text(json.dumps({"Layers": each, "Bindings": ["states", "logits"]}))
    return read_layers(path)


def test_fused_attention_is_counted(tmp_path):
    found = attention_in(layers(tmp_path, FUSED, GEMM, FUSED))

    assert (found.num_fused, found.num_unfused) == (2, 0)
    assert found.summary == "fused in 2 layers, by their names"


def test_a_softmax_by_itself_is_unfused_attention(tmp_path):
    assert attention_in(layers(tmp_path, FUSED, SOFTMAX)).summary.startswith("NOT FUSED in 1 layers")


def test_a_plan_without_attention_counts_nothing(tmp_path):
    assert attention_in(layers(tmp_path, GEMM)).summary == "no layer names an attention or a softmax"


def test_layers_that_are_names_alone_are_read(tmp_path):
    assert [each.name for each in layers(tmp_path, "fmha_v2_flash", GEMM)] == ["fmha_v2_flash", "node_MatMul_3"]


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": 3}', '{"layers": []}'])
def test_an_invalid_inspector_file_is_reported(tmp_path, text):
    path = tmp_path / "pair.layers.json"
    path.write_text(text)

    with pytest.raises(LayersUnreadable, match="is not what TensorRT's inspector writes"):
        read_layers(path)


def test_a_missing_inspector_file_is_reported(tmp_path):
    with pytest.raises(LayersUnreadable, match="cannot be read"):
        read_layers(tmp_path / "pair.layers.json")

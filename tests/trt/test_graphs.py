"""Inputs and outputs of an engine's graphs."""

from dataclasses import replace

import pytest

from edje.model.variants import VARIANTS
from trt.contract import EngineUnavailable
from trt.graphs import DIMENSIONS, GRAPH_NAMES, graphs_of
from trt.slab.layout import STORAGES, SlotLayout

PAPER = VARIANTS["paper-l16"]
SIZES = {"images": 2, "queries": 3, "text_tokens": 16, "pairs": 5}


@pytest.mark.parametrize("storage", STORAGES)
def test_stored_tokens_enter_with_the_bytes_of_their_slots(storage):
    layout = SlotLayout(storage, 64, 384)

    by_name = {each.name: each for each in graphs_of(PAPER, storage, "bf16")["pair"].inputs}

    assert by_name["tokens"].num_bytes(SIZES) == 5 * layout.token_bytes
    assert ("scales" in by_name) == bool(layout.scale_bytes)
    if layout.scale_bytes:
        assert by_name["scales"].num_bytes(SIZES) == 5 * layout.scale_bytes


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_the_query_graph_gives_the_states_that_the_pair_graph_takes(precision, dtype):
    graphs = graphs_of(PAPER, "int8", precision)

    assert graphs["query"].outputs[0] == graphs["pair"].inputs[0]
    assert graphs["query"].outputs[0].dtype == dtype
    assert graphs["query"].outputs[0].sized(SIZES) == (3, 16, 384)


def test_pixels_and_logits_are_the_same_whatever_the_precision():
    for precision in ("fp32", "fp16", "bf16"):
        graphs = graphs_of(PAPER, "int8", precision)

        assert (graphs["image"].inputs[0].dtype, graphs["image"].inputs[0].sized(SIZES)) == ("uint8", (2, 3, 384, 384))
        assert [each.dtype for each in (*graphs["image"].outputs, *graphs["pair"].outputs)] == ["float32"] * 3


def test_every_open_dimension_is_named_once():
    dimensions = {name: graphs_of(PAPER, "int8", "bf16")[name].dimensions for name in GRAPH_NAMES}

    assert dimensions == DIMENSIONS


def test_a_storage_type_that_the_tokens_do_not_fit_is_refused():
    narrow = replace(PAPER, joint=replace(PAPER.joint, dim=48))

    with pytest.raises(EngineUnavailable, match="multiple of 32"):
        graphs_of(narrow, "int4", "bf16")

"""The contract suite over every runtime, storage type and encoder."""

import functools

import pytest
import torch

from engine_contract import (
    LATE_FUSION,
    EngineContract,
)
from engine_directories import FIRST_LIMIT_S, sample
from small_engines import constant_engine, graphed_engine, onnx_engine, tensorrt_engine, torch_engine
from trt.slab.layout import STORAGES

KINDS = {
    "tensorrt": tensorrt_engine,
    "constant": constant_engine,
    "torch": torch_engine,
    "torch-bf16": lambda checkpoint, storage: torch_engine(checkpoint, storage, torch.bfloat16),
    "torch-graphs": graphed_engine,
    "torch-staged": lambda checkpoint, storage: torch_engine(checkpoint, storage, staged=True),
}


@pytest.fixture(
    params=[
        *((kind, storage, "tiny") for kind in KINDS for storage in STORAGES),
        *(
            (kind, "int8", variant)
            for kind in ("torch", "torch-bf16", "torch-graphs", "tensorrt")
            for variant in LATE_FUSION
        ),
        # Other storage types and encoders: test_onnx_engine.
        pytest.param(("onnx", "int8", "full"), marks=pytest.mark.timeout(FIRST_LIMIT_S), id="onnx-int8-full"),
    ],
    ids="-".join,
)
def engine(request, checkpoints):
    kind, storage, variant = request.param
    if kind == "onnx":
        return onnx_engine(sample(request.getfixturevalue("tmp_path_factory"), variant))
    return opened(kind, checkpoints / variant, storage)


@functools.cache  # no test depends on the slots that another has filled
def opened(kind, checkpoint, storage):
    return KINDS[kind](checkpoint, storage)


class TestEveryEngine(EngineContract):
    """The suite of every engine."""

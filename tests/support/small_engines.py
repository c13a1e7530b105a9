"""Engines of every runtime over small checkpoints, with the sizes of the contract suite."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from edje.model.weights import load_checkpoint
from engine_contract import MAX_IMAGES, MAX_PAIRS, NUM_SLOTS, SIZES
from engine_directories import Sample
from recorded_engine import open_recorded
from torch_recorder import LazyStream, RecordingTorch
from trt.contract import Engine
from trt.load import load_engine
from trt.runtimes.torch_device import TorchDevice
from trt.runtimes.torch_engine import TorchEngine
from trt.slab.layout import SlotLayout
from trt.slab.torch_slab import DeviceSlab, SharedSlab

CPU = torch.device("cpu")
STAGING_ROWS = 16


def torch_engine(
    checkpoint: Path,
    storage: str,
    dtype: torch.dtype = torch.float32,
    *,
    staged: bool = False,
    device: TorchDevice | None = None,
    **options: Any,
) -> TorchEngine:
    """The torch engine on a CPU; `staged` puts a staging ring before the slab, as on a GPU."""
    loaded = load_checkpoint(checkpoint)
    layout = SlotLayout(storage, loaded.config.adapter.num_tokens, loaded.config.joint.dim)
    slab = DeviceSlab(layout, NUM_SLOTS, CPU, LazyStream(), STAGING_ROWS) if staged else SharedSlab(layout, NUM_SLOTS)
    sizes = {"max_pairs": MAX_PAIRS, "max_images": MAX_IMAGES}
    return TorchEngine(loaded, slab=slab, device=device or TorchDevice(CPU), dtype=dtype, **(sizes | options))


def graphed_engine(checkpoint: Path, storage: str, dtype: torch.dtype = torch.float32, **options: Any) -> TorchEngine:
    """The torch engine as on a GPU: a staging ring, and graphs of a recorded device."""
    return torch_engine(checkpoint, storage, dtype, staged=True, device=RecordingTorch().device, **options)


def constant_engine(checkpoint: Path, storage: str, ms_per_item: float = 0.0) -> Engine:
    return loaded_engine("constant", checkpoint, storage=storage, constant_ms_per_item=ms_per_item)


def tensorrt_engine(checkpoint: Path, storage: str) -> Engine:
    """The TensorRT engine over recorded bindings, which compute in float32 with torch."""
    directory = checkpoint.with_name(f"{checkpoint.name}-{storage}-engine")
    return open_recorded(checkpoint, directory, storage, device="cuda", **SIZES)


@functools.cache
def onnx_engine(sample: Sample) -> Engine:
    """The exported graphs of a sample in ONNX Runtime."""
    return loaded_engine("onnx", sample.checkpoint, engine_directory=sample.engine, num_threads=1)


def loaded_engine(runtime: str, checkpoint: Path, **changes: Any) -> Engine:
    """`load_engine` with the sizes of the contract suite."""
    settings: dict[str, Any] = {"storage": "int8", "num_threads": None, "device": "cpu"}
    return load_engine(runtime, checkpoint, **(settings | SIZES | changes))  # type: ignore[arg-type]

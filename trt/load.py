"""Picks, checks and builds the engine of a runtime. Imports torch only where that runtime is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edje.checkpoint import CheckpointError, read_config, read_digest
from trt.engine import Engine, EngineMismatch, EngineUnavailable
from trt.slab import SlotLayout

Runtime = Literal["torch", "constant"]


def load_engine(
    runtime: Runtime,
    checkpoint: Path,
    *,
    storage: str,
    num_slots: int,
    max_pairs: int,
    max_images: int,
    num_threads: int | None,
    device: str,
    constant_ms_per_item: float = 0.0,
) -> Engine:
    """Load a checkpoint into an engine; not warmed up yet.

    `num_threads` (None: torch's choice) is set for the whole process. `constant_ms_per_item` is the constant engine's
    pretended cost of an image or pair. Raises `EngineUnavailable` for a runtime or device that this machine lacks and
    `EngineMismatch` for a checkpoint that cannot be used; each message says what to do.
    """
    try:
        if runtime == "constant":
            return _load_constant(checkpoint, storage, num_slots, max_pairs, max_images, constant_ms_per_item)
        if runtime == "torch":
            return _load_torch(checkpoint, storage, num_slots, max_pairs, max_images, num_threads, device)
    except CheckpointError as error:
        raise EngineMismatch(str(error)) from error
    raise EngineUnavailable(f"unknown engine {runtime!r}: choose torch or constant")


def slots_in(slab_bytes: int, checkpoint: Path, storage: str) -> int:
    """How many images of this checkpoint so many bytes of slab hold. Raises `EngineMismatch`, `EngineUnavailable`."""
    try:
        config = read_config(checkpoint)
    except CheckpointError as error:
        raise EngineMismatch(str(error)) from error
    layout = SlotLayout(storage, config.adapter.num_tokens, config.joint.dim)
    return slab_bytes // (layout.token_bytes + layout.scale_bytes)


def _load_constant(
    checkpoint: Path, storage: str, num_slots: int, max_pairs: int, max_images: int, ms_per_item: float
) -> Engine:
    from trt.constant import ConstantEngine

    return ConstantEngine(
        read_config(checkpoint),
        read_digest(checkpoint),
        storage=storage,
        num_slots=num_slots,
        max_pairs=max_pairs,
        max_images=max_images,
        ms_per_item=ms_per_item,
    )


def _load_torch(
    checkpoint: Path,
    storage: str,
    num_slots: int,
    max_pairs: int,
    max_images: int,
    num_threads: int | None,
    device: str,
) -> Engine:
    try:
        import torch
    except ImportError as error:
        raise EngineUnavailable(f"the torch engine needs torch, which cannot be imported: {error}") from error
    from edje.weights import load_checkpoint
    from trt.torch_engine import TorchEngine, fastest_dtype
    from trt.torch_slab import build_slab

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise EngineUnavailable(f"unknown device {device!r}: choose cpu, cuda or cuda:N") from error
    if target.type not in ("cpu", "cuda"):
        raise EngineUnavailable(f"the torch engine does not run on {device!r}: choose cpu, cuda or cuda:N")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise EngineUnavailable(
            f"device {device!r} was asked for and torch sees {torch.cuda.device_count()} CUDA devices: "
            "choose cpu, or install torch's CUDA build and the driver"
        )
    loaded = load_checkpoint(checkpoint)
    layout = SlotLayout(storage, loaded.config.adapter.num_tokens, loaded.config.joint.dim)
    return TorchEngine(
        loaded,
        slab=build_slab(layout, num_slots, target),
        max_pairs=max_pairs,
        max_images=max_images,
        device=target,
        dtype=fastest_dtype(target),
    )

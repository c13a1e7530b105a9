"""Picks, checks and builds the engine of a runtime. Imports torch only where that runtime is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from edje.checkpoint import CheckpointError, read_config, read_digest
from trt.contract import Engine, EngineMismatch, EngineUnavailable
from trt.manifest import Manifest, read_manifest
from trt.matching import limit_mismatches, model_mismatches, refuse, with_limits
from trt.slab.layout import SlotLayout

Runtime = Literal["torch", "tensorrt", "onnx", "constant"]


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
    engine_directory: Path | None = None,
    fixed_buckets: bool = False,
    constant_ms_per_item: float = 0.0,
) -> Engine:
    """Load a checkpoint into an engine; not warmed up yet.

    `engine_directory` is what `python -m trt.build` made of the checkpoint, for the runtimes that run that.
    `fixed_buckets` asks torch or tensorrt for logits that do not depend on what else they are computed with.
    `num_threads` (None: the runtime's choice) is set for the whole process. `constant_ms_per_item` is the constant
    engine's pretended cost of an image or pair. Raises `EngineUnavailable` for a runtime or device that this machine
    lacks and `EngineMismatch` for a checkpoint or an engine that cannot be used; each message says what to do.
    """
    try:
        if runtime == "constant":
            return _load_constant(checkpoint, storage, num_slots, max_pairs, max_images, constant_ms_per_item)
        if runtime == "torch":
            return _load_torch(
                checkpoint, storage, num_slots, max_pairs, max_images, num_threads, device, fixed_buckets
            )
        if runtime == "onnx":
            if device != "cpu":
                raise EngineUnavailable(f"the onnx engine does not run on {device!r}: choose cpu, or another engine")
            built = _built_from(checkpoint, engine_directory, storage, max_pairs, max_images)
            return open_onnx(*built, num_slots, max_pairs, max_images, num_threads)
        if runtime == "tensorrt":
            built = _built_from(checkpoint, engine_directory, storage, max_pairs, max_images)
            return open_tensorrt(*built, num_slots, max_pairs, max_images, device, fixed_buckets=fixed_buckets)
    except CheckpointError as error:
        raise EngineMismatch(str(error)) from error
    raise EngineUnavailable(f"unknown engine {runtime!r}: choose torch, tensorrt, onnx or constant")


def slots_in(slab_bytes: int, checkpoint: Path, storage: str) -> int:
    """How many images of this checkpoint so many bytes of slab hold. Raises `EngineMismatch`, `EngineUnavailable`."""
    try:
        config = read_config(checkpoint)
    except CheckpointError as error:
        raise EngineMismatch(str(error)) from error
    layout = SlotLayout(storage, config.adapter.num_tokens, config.joint.dim)
    return slab_bytes // (layout.token_bytes + layout.scale_bytes)


def _built_from(
    checkpoint: Path, directory: Path | None, storage: str, max_pairs: int, max_images: int
) -> tuple[Path, Manifest]:
    """An engine directory and its manifest, which fits the checkpoint and what is asked."""
    if directory is None:
        raise EngineUnavailable("this runtime needs an engine directory: make one with `python -m trt.build`")
    manifest = read_manifest(directory)
    reasons = model_mismatches(manifest, model_digest=read_digest(checkpoint))
    asked: dict[str, Any] = {"storage": storage, "max_pairs": max_pairs, "max_images": max_images}
    reasons += limit_mismatches(manifest, **asked)
    refuse(directory, with_limits(manifest, **asked), reasons)
    return directory, manifest


def open_onnx(
    directory: Path, manifest: Manifest, num_slots: int, max_pairs: int, max_images: int, num_threads: int | None
) -> Engine:
    """The graphs of an engine directory in ONNX Runtime. Raises `EngineMismatch` and `EngineUnavailable`."""
    from trt.runtimes.onnx_engine import OnnxEngine

    return OnnxEngine(
        directory,
        manifest,
        num_slots=num_slots,
        max_pairs=max_pairs,
        max_images=max_images,
        num_threads=num_threads,
    )


def open_tensorrt(
    directory: Path,
    manifest: Manifest,
    num_slots: int,
    max_pairs: int,
    max_images: int,
    device: str,
    *,
    fixed_buckets: bool = False,
) -> Engine:
    """The plans of an engine directory on a GPU. Raises `EngineMismatch` and `EngineUnavailable`."""
    try:
        from trt.runtimes.tensorrt_load import load_tensorrt
    except ImportError as error:
        raise EngineUnavailable(
            f"the tensorrt engine needs TensorRT and pycuda, which cannot be imported ({error}): "
            "`pip install 'edje-rerank[gpu]'` on a machine with an NVIDIA GPU, or choose torch or onnx"
        ) from error
    return load_tensorrt(
        directory,
        manifest,
        num_slots=num_slots,
        max_pairs=max_pairs,
        max_images=max_images,
        device=device,
        fixed_buckets=fixed_buckets,
    )


def _load_constant(
    checkpoint: Path, storage: str, num_slots: int, max_pairs: int, max_images: int, ms_per_item: float
) -> Engine:
    from trt.runtimes.constant_engine import ConstantEngine

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
    fixed_buckets: bool,
) -> Engine:
    try:
        import torch
    except ImportError as error:
        raise EngineUnavailable(f"the torch engine needs torch, which cannot be imported: {error}") from error
    from edje.model.weights import load_checkpoint
    from trt.runtimes.torch_engine import TorchEngine, fastest_dtype
    from trt.slab.host import build_slab

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
        fixed_buckets=fixed_buckets,
    )

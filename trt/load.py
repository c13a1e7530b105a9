"""Loads a checkpoint or an engine directory into a runtime. Imports only the chosen runtime."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from edje.checkpoint import CheckpointError, read_config, read_digest
from edje.config import EdjeConfig
from trt.choice import fastest_engine
from trt.contract import Engine, EngineMismatch, EngineUnavailable
from trt.manifest import Manifest, read_manifest
from trt.matching import limit_mismatches, model_mismatches, refuse, with_limits
from trt.slab.derived import keys_values_row, match_row
from trt.slab.layout import SlotLayout

Runtime = Literal["auto", "torch", "tensorrt", "onnx", "constant"]


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
    hot_images: int = 0,
    constant_ms_per_item: float = 0.0,
) -> Engine:
    """Load a checkpoint into an engine, which is not warmed up yet.

    `auto` on a GPU chooses TensorRT if the engine directory has plans, else torch. On a CPU it chooses torch; with an
    engine directory and without `fixed_buckets`, the faster of torch and ONNX Runtime in a short trial.

    Args:
        engine_directory: output of `python -m trt.build` for this checkpoint; used by onnx and tensorrt.
        fixed_buckets: whether logits must not depend on the batch; used by torch and tensorrt.
        hot_images: number of images whose visual keys and values are kept; used by torch with encoders of kind
            `minimal`.
        num_threads: threads of the whole process; None leaves the choice to the runtime.
        constant_ms_per_item: milliseconds that the constant engine sleeps for each image or pair.

    Raises `EngineUnavailable` for a runtime or device that this machine lacks, and `EngineMismatch` for a checkpoint or
    an engine directory that cannot be used; each message ends with what to do.
    """
    if runtime == "auto":
        given: dict[str, Any] = {
            "storage": storage,
            "num_slots": num_slots,
            "max_pairs": max_pairs,
            "max_images": max_images,
            "num_threads": num_threads,
            "device": device,
            "engine_directory": engine_directory,
            "fixed_buckets": fixed_buckets,
            "hot_images": hot_images,
        }
        engines: dict[str, Engine] = {
            each: load_engine(each, checkpoint, **given)
            for each in _candidates(device, engine_directory, fixed_buckets)
        }
        return engines[fastest_engine(engines, time.perf_counter)]
    try:
        if runtime == "constant":
            return _load_constant(checkpoint, storage, num_slots, max_pairs, max_images, constant_ms_per_item)
        if runtime == "torch":
            sizes = (num_slots, max_pairs, max_images)
            return _load_torch(checkpoint, storage, sizes, num_threads, device, fixed_buckets, hot_images)
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
    raise EngineUnavailable(f"unknown engine {runtime!r}: choose auto, torch, tensorrt, onnx or constant")


def _candidates(device: str, engine_directory: Path | None, fixed_buckets: bool) -> tuple[Runtime, ...]:
    """Return the runtimes that `auto` tries, the preferred one first."""
    if device != "cpu":
        has_plans = engine_directory is not None and read_manifest(engine_directory).built_on is not None
        return ("tensorrt",) if has_plans else ("torch",)
    return ("torch",) if engine_directory is None or fixed_buckets else ("torch", "onnx")


def slots_in(
    slab_bytes: int,
    checkpoint: Path,
    storage: str,
    *,
    runtime: Runtime = "torch",
    device: str = "cpu",
    hot_images: int = 0,
) -> int:
    """Return the number of images of this checkpoint that fit in `slab_bytes`, including their derived rows.

    Raises `EngineMismatch`, and `EngineUnavailable` if the rows of the hot images alone do not fit.
    """
    try:
        config = read_config(checkpoint)
    except CheckpointError as error:
        raise EngineMismatch(str(error)) from error
    slot_bytes, hot_image_bytes = row_bytes(config, storage, runtime, device)
    free_bytes = slab_bytes - hot_images * hot_image_bytes
    if free_bytes < 0:
        raise EngineUnavailable(
            f"the keys and values of {hot_images} hot images take {hot_images * hot_image_bytes:,} bytes "
            f"({hot_image_bytes:,} each), the slab has {slab_bytes:,}: ask for fewer hot images or a larger slab"
        )
    return free_bytes // slot_bytes


def row_bytes(config: EdjeConfig, storage: str, runtime: Runtime, device: str) -> tuple[int, int]:
    """Return the bytes of a slot with its derived row, and of a hot image's keys and values (0 without such rows)."""
    layout = SlotLayout(storage, config.adapter.num_tokens, config.joint.dim)
    slot_bytes = layout.token_bytes + layout.scale_bytes
    if runtime not in ("torch", "auto"):  # other runtimes have no derived rows
        return slot_bytes, 0
    match = match_row(config)
    if config.joint.kind != "minimal":
        return slot_bytes + (match.num_bytes if match else 0), 0
    from trt.runtimes.torch_device import fastest_dtype, named_device

    keys_values = keys_values_row(config, str(fastest_dtype(named_device(device))).removeprefix("torch."))
    return slot_bytes + (match.num_bytes if match else 0), keys_values.num_bytes if keys_values else 0


def _built_from(
    checkpoint: Path, directory: Path | None, storage: str, max_pairs: int, max_images: int
) -> tuple[Path, Manifest]:
    """Return an engine directory and its manifest, checked against the checkpoint and the requested limits."""
    if directory is None:
        raise EngineUnavailable("this runtime needs an engine directory: build one with `python -m trt.build`")
    manifest = read_manifest(directory)
    reasons = model_mismatches(manifest, model_digest=read_digest(checkpoint))
    asked: dict[str, Any] = {"storage": storage, "max_pairs": max_pairs, "max_images": max_images}
    reasons += limit_mismatches(manifest, **asked)
    refuse(directory, with_limits(manifest, **asked), reasons)
    return directory, manifest


def open_onnx(
    directory: Path, manifest: Manifest, num_slots: int, max_pairs: int, max_images: int, num_threads: int | None
) -> Engine:
    """Open the graphs of an engine directory in ONNX Runtime. Raises `EngineMismatch` and `EngineUnavailable`."""
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
    """Open the plans of an engine directory on a GPU. Raises `EngineMismatch` and `EngineUnavailable`."""
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
    sizes: tuple[int, int, int],
    num_threads: int | None,
    device: str,
    fixed_buckets: bool,
    hot_images: int,
) -> Engine:
    try:
        import torch
    except ImportError as error:
        raise EngineUnavailable(f"the torch engine needs torch, which cannot be imported: {error}") from error
    from edje.model.weights import load_checkpoint
    from trt.runtimes.torch_device import fastest_dtype, named_device, torch_device
    from trt.runtimes.torch_engine import TorchEngine
    from trt.slab.torch_slab import build_slab

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    target = named_device(device)
    loaded = load_checkpoint(checkpoint)
    num_slots, max_pairs, max_images = sizes
    layout = SlotLayout(storage, loaded.config.adapter.num_tokens, loaded.config.joint.dim)
    return TorchEngine(
        loaded,
        slab=build_slab(layout, num_slots, target),
        max_pairs=max_pairs,
        max_images=max_images,
        device=torch_device(target),
        dtype=fastest_dtype(target),
        fixed_buckets=fixed_buckets,
        hot_images=hot_images,
    )

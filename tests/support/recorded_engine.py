"""TensorRT engines without TensorRT: an engine directory whose plans are recorded ones, opened on a recorded GPU.

What a plan computes is computed by the modules that its graph is exported from, in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edje.config import canonical_json
from edje.model.weights import load_checkpoint
from recording_cuda import Gpu, cuda_modules
from recording_tensorrt import VERSION, Compute, plan_of, tensorrt_module
from trt.export.modules import ImagePart, PairPart, QueryPart
from trt.graphs import graphs_of
from trt.load import open_tensorrt
from trt.manifest import BuildOptions, BuiltOn, FileDigest, GraphFiles, Manifest, digest_file, write_manifest
from trt.profiles import profiles_of
from trt.slab.layout import SlotLayout

#: Modules that use the GPU and are imported again over the recorded modules.
OVER_THE_GPU = (
    "trt.cuda.",
    "trt.slab.device",
    "trt.runtimes.tensorrt_",
    "trt.build.plan_builder",
    "trt.build.tensorrt_compiler",
)
MAX_QUERIES = 6


@contextmanager
def recorded_modules(gpu: Gpu, checkpoint: Path | None = None, without: str = "") -> Iterator[None]:
    """While it lasts, `trt` is imported over the recorded GPU; `checkpoint` is what its plans compute with.

    `without` names a module that cannot be imported.
    """
    modules: dict[str, Any] = dict(cuda_modules(gpu))
    if checkpoint is not None:
        modules["tensorrt"] = tensorrt_module(gpu, compute_of(checkpoint))
    others = {name: module for name, module in sys.modules.items() if name.startswith(OVER_THE_GPU) or name in modules}
    if without:
        modules[without] = None  # which is how Python remembers it
    for name in others:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(OVER_THE_GPU) or name in modules]:
            del sys.modules[name]
        sys.modules.update(others)


def compute_of(checkpoint: Path) -> Any:
    """Return a function that opens a graph by the arguments of `plan_of`: its name and storage type."""
    loaded = load_checkpoint(checkpoint)
    model = loaded.model.eval()

    def open_graph(name: str, storage: str) -> Compute:
        layout = SlotLayout(storage, loaded.config.adapter.num_tokens, loaded.config.joint.dim)
        parts = {"image": ImagePart(model), "query": QueryPart(model, torch.float32), "pair": PairPart(model, layout)}

        @torch.inference_mode()
        def compute(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            tensors = {key: torch.from_numpy(values) for key, values in inputs.items()}
            answer = parts[name](**tensors)
            return [each.numpy() for each in (answer if isinstance(answer, tuple) else (answer,))]

        return compute

    return open_graph


def write_engine(checkpoint: Path, directory: Path, storage: str, *, max_pairs: int, max_images: int, **changes: Any):
    """An engine directory for the recorded GPU. `changes` are of the manifest."""
    loaded = load_checkpoint(checkpoint)
    options = BuildOptions(
        storage=storage, precision="fp32", max_pairs=max_pairs, max_images=max_images, length_buckets=(8, 32, 64)
    )
    profiles = profiles_of(
        max_text_tokens=loaded.config.preprocess.max_text_tokens,
        length_buckets=options.length_buckets,
        max_pairs=max_pairs,
        max_queries=MAX_QUERIES,
        max_images=max_images,
    )
    directory.mkdir(parents=True, exist_ok=True)
    graphs = {}
    for name, spec in graphs_of(loaded.config, storage, "fp32").items():
        plan = directory / f"{name}.plan"
        plan.write_bytes(plan_of(spec, storage))
        onnx = FileDigest(name=f"{name}.onnx", sha256="0" * 64, num_bytes=0)
        graphs[name] = GraphFiles(onnx=onnx, plan=digest_file(plan), profiles=profiles[name])
    manifest = Manifest(
        model_digest=loaded.digest,
        model=json.loads(canonical_json(loaded.config)),
        options=options,
        opset=22,
        graphs=graphs,
        built_on=BuiltOn(tensorrt_version=VERSION, gpu="NVIDIA Recorded", compute_capability=(9, 0)),
        versions={},
    ).model_copy(update=changes)
    write_manifest(directory, manifest)
    return manifest


def open_recorded(checkpoint: Path, directory: Path, storage: str, gpu: Gpu | None = None, **settings: Any) -> Any:
    """The engine of a directory that is written first, on a GPU of its own."""
    sizes = {key: settings[key] for key in ("max_pairs", "max_images")}
    manifest = write_engine(checkpoint, directory, storage, **sizes)
    with recorded_modules(gpu or Gpu(), checkpoint):
        return open_tensorrt(directory, manifest, **settings)

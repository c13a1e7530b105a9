"""Opens an engine directory on a GPU: compares the manifest with the device, then loads the plans."""

from __future__ import annotations

from pathlib import Path

import pycuda.driver as cuda
import tensorrt

from trt.cuda.context import NON_BLOCKING, CudaDevice, device_ordinal
from trt.cuda.kernels import RowCopier
from trt.cuda.memory import device_memory
from trt.graphs import (
    GRAPH_NAMES,
    IMAGES,
    ITEM_BYTES,
    PAIRS,
    PRECISION_TYPES,
    QUERIES,
    TEXT_TOKENS,
    GraphName,
    graphs_of,
)
from trt.identity import engine_info
from trt.manifest import Manifest, check_files
from trt.matching import mismatches, refuse
from trt.runtimes.static_shapes import Buckets, count_buckets, length_buckets
from trt.runtimes.tensorrt_engine import TensorRtEngine
from trt.runtimes.tensorrt_plan import Plan
from trt.runtimes.tensorrt_stage import Stage, Stages
from trt.slab.device import CudaSlab
from trt.slab.layout import SlotLayout

#: Sizes per profile: at most a quarter of a profile's largest size is padding.
_STEPS = 4


def load_tensorrt(
    directory: Path,
    manifest: Manifest,
    *,
    num_slots: int,
    max_pairs: int,
    max_images: int,
    device: str,
    fixed_buckets: bool,
) -> TensorRtEngine:
    """Load the engine of a directory, which is not warmed up yet.

    `fixed_buckets`: every run of a length bucket has the same size, so that a logit does not depend on the number of
    pairs in its run. Raises `EngineMismatch` for plans that are damaged or built for another model or machine, and
    `EngineUnavailable` without a GPU or enough memory.
    """
    gpu = CudaDevice(device_ordinal(device))
    wrong = mismatches(
        manifest,
        model_digest=manifest.model_digest,  # the caller has compared it with the checkpoint
        tensorrt_version=tensorrt.__version__,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
    )
    wrong += [f"the {name} graph has no plan" for name, files in manifest.graphs.items() if files.plan is None]
    refuse(directory, manifest, wrong)
    check_files(directory, manifest, plans=True)
    config, options = manifest.config, manifest.options
    layout = SlotLayout(options.storage, config.adapter.num_tokens, config.joint.dim)
    with gpu.current():
        copier = RowCopier(gpu.compute_capability)
        stream = cuda.Stream(NON_BLOCKING)
        stages = _stages(directory, manifest, stream, max_pairs, max_images, fixed_buckets)
    slab = CudaSlab(gpu, copier, layout, num_slots)
    info = engine_info(
        config,
        layout,
        runtime="tensorrt",
        model_digest=manifest.model_digest,
        engine_digest=manifest.engine_digest("tensorrt", fixed_buckets=fixed_buckets),
        max_images=max_images,
        max_pairs=max_pairs,
        num_slots=num_slots,
    )
    return TensorRtEngine(
        info,
        gpu,
        stream,
        slab,
        stages,
        vocab_size=config.joint.vocab_size,
        pooled_dim=config.vision.pooled_dim,
        state_bytes=config.joint.dim * ITEM_BYTES[PRECISION_TYPES[options.precision]],
    )


def _stages(
    directory: Path, manifest: Manifest, stream: cuda.Stream, max_pairs: int, max_images: int, fixed_buckets: bool
) -> Stages:
    options = manifest.options
    specs = graphs_of(manifest.config, options.storage, options.precision)
    profiles = {name: manifest.graphs[name].profiles for name in GRAPH_NAMES}

    def buckets(name: GraphName, dimension: str, most: int, steps: int) -> Buckets:
        ranges = [each.ranges[dimension] for each in profiles[name]]
        return count_buckets(ranges, most, steps=steps, fixed=fixed_buckets)

    images = buckets("image", IMAGES, max_images, _STEPS)
    queries = buckets("query", QUERIES, max_pairs, 1)  # too little work for more sizes
    pairs = buckets("pair", PAIRS, max_pairs, _STEPS)
    text_tokens = length_buckets([each.ranges[TEXT_TOKENS] for each in profiles["pair"]])
    plans = {
        name: Plan(directory / files.plan.name, specs[name], version_compatible=options.version_compatible)
        for name, files in manifest.graphs.items()
        if files.plan is not None
    }
    largest = {
        IMAGES: images.largest,
        QUERIES: queries.largest,
        TEXT_TOKENS: text_tokens.largest,
        PAIRS: pairs.largest,
    }
    scratch_bytes = max(plan.scratch_bytes for plan in plans.values())
    scratch = device_memory(scratch_bytes, "no memory for the plans' scratch space: ask for fewer slots")
    image, query, pair = (
        Stage(specs[name], plans[name], profiles[name], largest=largest, scratch=scratch, stream=stream)
        for name in GRAPH_NAMES
    )
    return Stages(image, query, pair, images, queries, text_tokens, pairs)

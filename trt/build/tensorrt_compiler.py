"""Builds the plans of an engine directory on one GPU. Imported only where TensorRT and pycuda are installed."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from trt.build.plan_builder import TENSORRT_VERSION, PlanBuilder
from trt.check.plan_layers import attention_in, read_layers
from trt.contract import Engine, EngineError
from trt.cuda.context import CudaDevice, device_ordinal
from trt.graphs import GRAPH_NAMES, graphs_of
from trt.load import open_tensorrt
from trt.manifest import BuildOptions, BuiltOn, Manifest, digest_file


class AttentionNotFused(EngineError):
    """A plan computes attention in several kernels; the message names the graph and the options to change."""


class TensorRtCompiler:
    """`trt.build.assemble.PlanCompiler` over TensorRT's builder."""

    def __init__(
        self,
        options: BuildOptions,
        *,
        device: str,
        timing_cache: Path | None,
        error_on_cache_miss: bool,
        allow_unfused_attention: bool,
    ) -> None:
        """Raises `EngineUnavailable` without a GPU."""
        self._device = device
        # In float32 TensorRT has no fused attention.
        self._allow_unfused = allow_unfused_attention or options.precision == "fp32"
        self._gpu = CudaDevice(device_ordinal(device))
        with self._gpu.current():
            self._builder = PlanBuilder(options, timing_cache=timing_cache, error_on_cache_miss=error_on_cache_miss)

    def build(self, directory: Path, manifest: Manifest, bars: Progress) -> Manifest:
        """Write the plans and return the manifest with the plans added. Raises `AttentionNotFused`.

        Takes minutes, because TensorRT times every possible kernel for every profile.
        """
        options = manifest.options
        specs = graphs_of(manifest.config, options.storage, options.precision)
        graphs = dict(manifest.graphs)
        for name in GRAPH_NAMES:
            part, bar = graphs[name], bars.add_task(f"plan of {name}", total=None)

            def show(phase: str, done: int, total: int, bar: object = bar, name: str = name) -> None:
                bars.update(bar, description=f"plan of {name}: {phase}", completed=done, total=total)  # type: ignore[arg-type]

            with self._gpu.current():
                built = self._builder.build(directory / part.onnx.name, specs[name], part.profiles, show)
            plan, layers = directory / f"{name}.plan", directory / f"{name}.layers.json"
            plan.write_bytes(built.plan)
            layers.write_text(built.layers_json, encoding="utf-8")
            attention = attention_in(read_layers(layers))
            if attention.num_unfused and not self._allow_unfused:
                raise AttentionNotFused(
                    f"the plan of the {name} graph computes attention in several kernels: {attention.summary}: "
                    "build with another TensorRT or --optimization-level, or accept a slower "
                    "engine with --allow-unfused-attention"
                )
            graphs[name] = part.model_copy(update={"plan": digest_file(plan), "layers": layers.name})
        built_on = BuiltOn(
            tensorrt_version=TENSORRT_VERSION,
            gpu=self._gpu.name,
            compute_capability=self._gpu.compute_capability,
        )
        return manifest.model_copy(update={"graphs": graphs, "built_on": built_on})

    def load(self, directory: Path, manifest: Manifest, num_slots: int) -> Engine:
        options = manifest.options
        return open_tensorrt(directory, manifest, num_slots, options.max_pairs, options.max_images, self._device)

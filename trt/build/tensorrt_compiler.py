"""Plans of a whole engine directory on one GPU. Imported only where TensorRT and pycuda are."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from trt.build.plan_builder import TENSORRT_VERSION, PlanBuilder
from trt.contract import Engine
from trt.cuda.context import CudaDevice, device_ordinal
from trt.graphs import GRAPH_NAMES, graphs_of
from trt.load import open_tensorrt
from trt.manifest import BuildOptions, BuiltOn, Manifest, digest_file


class TensorRtCompiler:
    """`trt.build.assemble.PlanCompiler` over TensorRT's builder."""

    def __init__(
        self, options: BuildOptions, *, device: str, timing_cache: Path | None, error_on_cache_miss: bool
    ) -> None:
        """Raises `EngineUnavailable` without a GPU."""
        self._device = device
        self._gpu = CudaDevice(device_ordinal(device))
        with self._gpu.current():
            self._builder = PlanBuilder(options, timing_cache=timing_cache, error_on_cache_miss=error_on_cache_miss)

    def build(self, directory: Path, manifest: Manifest, bars: Progress) -> Manifest:
        """Minutes: every kernel that could serve is timed, for every profile."""
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

"""Builds a plan from an ONNX graph with TensorRT. The only module that uses TensorRT's builder.

The same code runs with TensorRT 10.12 to 11.4. Networks are strongly typed: the graph decides the precision, no flag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorrt

from edje.files import write_file
from trt.contract import EngineError, EngineUnavailable
from trt.graphs import GraphSpec
from trt.manifest import BuildOptions, HardwareCompatibility
from trt.profiles import Profile
from trt.runtimes.tensorrt_plan import TensorRtLog

TENSORRT_VERSION: str = tensorrt.__version__
_GIB = 1 << 30


class PlanFailed(EngineError):
    """TensorRT cannot build a plan from a graph; the message holds TensorRT's own error."""


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A plan, and its layers as the JSON of TensorRT's inspector."""

    plan: bytes
    layers_json: str


#: Called with the name of a build phase, the number of finished steps and the number of all steps.
ReportProgress = Callable[[str, int, int], None]


class PlanBuilder:
    """Builds several plans with the same options and one shared cache of kernel timings."""

    def __init__(self, options: BuildOptions, *, timing_cache: Path | None, error_on_cache_miss: bool) -> None:
        """Raises `EngineUnavailable` where there is no GPU."""
        self._options = options
        self._timing_cache = timing_cache
        self._error_on_cache_miss = error_on_cache_miss
        self._log = TensorRtLog()
        try:
            self._builder = tensorrt.Builder(self._log)
        except TypeError as error:  # the bindings raise TypeError when the builder cannot be created
            raise EngineUnavailable(
                f"TensorRT {tensorrt.__version__} finds no GPU to build on ({self._log.last_error}): install the "
                "driver, or export with --onnx-only and build on a machine that has one"
            ) from error

    def build(self, onnx: Path, spec: GraphSpec, profiles: Sequence[Profile], progress: ReportProgress) -> BuiltPlan:
        """Build the plan of a graph with one optimisation profile for each of `profiles`. Raises `PlanFailed`."""
        network = self._parse(onnx)
        config = self._configure(progress)
        for profile in profiles:
            self._add_profile(config, spec, profile)
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise PlanFailed(f"TensorRT built no plan from {onnx.name}: {self._log.last_error}")
        content = bytes(plan)
        self._keep_timings(config)
        return BuiltPlan(content, self._inspect(onnx.name, content))

    def _parse(self, onnx: Path) -> tensorrt.INetworkDefinition:
        network = self._builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = tensorrt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(onnx)):  # from the path: weights may be in a second file next to it
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            reasons = "; ".join(f"{each.node_operator()} (node {each.node_name()!r}): {each.desc()}" for each in errors)
            raise PlanFailed(f"TensorRT cannot parse {onnx.name}: {reasons or self._log.last_error}")
        return network

    def _configure(self, progress: ReportProgress) -> tensorrt.IBuilderConfig:
        options = self._options
        config = self._builder.create_builder_config()
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * _GIB))
        config.builder_optimization_level = options.optimization_level
        config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED  # names every layer for the inspector
        config.hardware_compatibility_level = _HARDWARE[options.hardware_compatibility]
        config.progress_monitor = _Monitor(progress)
        config.clear_flag(tensorrt.BuilderFlag.TF32)  # the float32 parts of the graph keep full precision
        config.set_flag(tensorrt.BuilderFlag.STRICT_NANS)  # a value that is not finite must reach the logit
        if options.version_compatible:
            config.set_flag(tensorrt.BuilderFlag.VERSION_COMPATIBLE)
        if self._timing_cache is not None:
            self._use_timings(config, self._timing_cache)
        return config

    def _use_timings(self, config: tensorrt.IBuilderConfig, path: Path) -> None:
        """Use the timings stored in this file. The cache is editable, so that a rebuild chooses the same kernels."""
        config.set_flag(tensorrt.BuilderFlag.EDITABLE_TIMING_CACHE)
        if self._error_on_cache_miss:
            config.set_flag(tensorrt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
        kept = path.read_bytes() if path.exists() else b""
        cache = config.create_timing_cache(kept)
        if cache is None or not config.set_timing_cache(cache, False):
            raise PlanFailed(
                f"{path} is not a timing cache of this TensorRT and this GPU: "
                f"give another file ({self._log.last_error})"
            )

    def _keep_timings(self, config: tensorrt.IBuilderConfig) -> None:
        if self._timing_cache is None:
            return
        cache = config.get_timing_cache()
        if cache is not None:
            write_file(self._timing_cache, bytes(cache.serialize()))

    def _add_profile(self, config: tensorrt.IBuilderConfig, spec: GraphSpec, profile: Profile) -> None:
        added = self._builder.create_optimization_profile()
        smallest, usual, largest = (profile.sizes(which) for which in ("min", "opt", "max"))
        for tensor in spec.inputs:
            added.set_shape(tensor.name, tensor.sized(smallest), tensor.sized(usual), tensor.sized(largest))
        if config.add_optimization_profile(added) < 0:
            raise PlanFailed(f"TensorRT refuses the profile {profile.name!r}: {self._log.last_error}")

    def _inspect(self, name: str, plan: bytes) -> str:
        runtime = tensorrt.Runtime(self._log)
        # Safe for a plan that was just built here: a version-compatible plan contains host code.
        runtime.engine_host_code_allowed = self._options.version_compatible
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise PlanFailed(f"TensorRT cannot open the plan that it built from {name}: {self._log.last_error}")
        layers: str = engine.create_engine_inspector().get_engine_information(tensorrt.LayerInformationFormat.JSON)
        return layers


_HARDWARE: dict[HardwareCompatibility, tensorrt.HardwareCompatibilityLevel] = {
    "none": tensorrt.HardwareCompatibilityLevel.NONE,
    "same_compute_capability": tensorrt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    "ampere_plus": tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS,
}


class _Monitor(tensorrt.IProgressMonitor):
    """Reports the progress of the outermost phase. TensorRT calls it from its own threads."""

    def __init__(self, progress: ReportProgress) -> None:
        tensorrt.IProgressMonitor.__init__(self)
        self._progress = progress
        self._num_steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if parent_phase is None:
            self._num_steps[phase_name] = num_steps
            self._progress(phase_name, 0, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Return True, which continues the build: a build is stopped by ending the process."""
        if phase_name in self._num_steps:
            self._progress(phase_name, step + 1, self._num_steps[phase_name])
        return True

    def phase_finish(self, phase_name: str) -> None:
        if phase_name in self._num_steps:
            num_steps = self._num_steps.pop(phase_name)
            self._progress(phase_name, num_steps, num_steps)

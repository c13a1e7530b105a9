"""The builder's half of TensorRT, put into the module of `recording_tensorrt`: it records how a plan was asked for.

Public names are those of the real module (`tests/trt/native` compares them); whatever begins with `_` is our own.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass
class Recorder:
    """The requests to the builder, and the calls that are to fail."""

    plans: dict[str, bytes] = field(default_factory=dict)  # the plan of each graph, by its file's stem
    faults: set[str] = field(default_factory=set)
    parser_errors: list[tuple[str, str, str]] = field(default_factory=list)  # operator, node, description
    networks: list[dict[str, Any]] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    timings: bytes = b"timings"


def with_builder(module: ModuleType, recorder: Recorder) -> ModuleType:
    """The module with a builder, a parser and an inspector in it."""
    logger_class = module.ILogger

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 1

    class BuilderFlag(enum.Enum):
        TF32, VERSION_COMPATIBLE, EDITABLE_TIMING_CACHE, ERROR_ON_TIMING_CACHE_MISS, STRICT_NANS = range(5)

    class MemoryPoolType(enum.Enum):
        WORKSPACE = 0

    class ProfilingVerbosity(enum.Enum):
        LAYER_NAMES_ONLY, DETAILED = range(2)

    class HardwareCompatibilityLevel(enum.Enum):
        NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)

    class LayerInformationFormat(enum.Enum):
        JSON = 0

    class IProgressMonitor:
        pass

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            self._asked = {"flags": flags}
            recorder.networks.append(self._asked)

    class ParserError:
        def __init__(self, operator: str, node: str, description: str) -> None:
            self._said = operator, node, description

        def node_operator(self) -> str:
            return self._said[0]

        def node_name(self) -> str:
            return self._said[1]

        def desc(self) -> str:
            return self._said[2]

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: Any) -> None:
            self._network = network

        def parse_from_file(self, model: str) -> bool:
            self._network._asked["file"] = model
            return Path(model).exists() and not recorder.parser_errors

        @property
        def num_errors(self) -> int:
            return len(recorder.parser_errors)

        def get_error(self, index: int) -> ParserError:
            return ParserError(*recorder.parser_errors[index])

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, tuple[Any, Any, Any]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            assert all(type(each) is int for shape in (min, opt, max) for each in shape)
            self._shapes[input] = (min, opt, max)

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> bytes:
            return self._content + b"+"

    class IBuilderConfig:
        def __init__(self) -> None:
            self.builder_optimization_level = -1
            self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
            self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
            self.progress_monitor: Any = None
            self._flags = {BuilderFlag.TF32}
            self._limits: dict[MemoryPoolType, int] = {}
            self._profiles: list[IOptimizationProfile] = []
            self._cache: Any = None
            recorder.configs.append(self)

        def set_flag(self, flag: BuilderFlag) -> None:
            self._flags.add(flag)

        def clear_flag(self, flag: BuilderFlag) -> None:
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
            self._limits[pool] = pool_size

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            if "profile" in recorder.faults:
                return -1
            self._profiles.append(profile)
            return len(self._profiles) - 1

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            return ITimingCache(bytes(serialized_timing_cache) or recorder.timings)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self._cache = cache
            return "timing cache" not in recorder.faults and not ignore_mismatch

        def get_timing_cache(self) -> Any:
            return self._cache

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger
            if "no gpu" in recorder.faults:
                logger.log(logger_class.ERROR, "CUDA initialization failure with error: 100")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Timing", "Building", 5)
            assert monitor.step_complete("Timing", 0)
            monitor.phase_finish("Timing")
            assert monitor.step_complete("Building", 0)
            monitor.phase_finish("Building")
            if "no plan" in recorder.faults:
                self._logger.log(logger_class.ERROR, "no tactic fits into the workspace")
                return None
            return recorder.plans[Path(network._asked["file"]).stem]

    class EngineInspector:
        def get_engine_information(self, format: LayerInformationFormat) -> str:
            assert format is LayerInformationFormat.JSON
            return '{"Layers": [{"Name": "_gemm_mha_v2_myl0_1", "LayerType": "kgen"}], "Bindings": []}'

    def create_engine_inspector(self: Any) -> EngineInspector:
        return EngineInspector()

    module.ICudaEngine.create_engine_inspector = create_engine_inspector
    made = {name: each for name, each in locals().items() if isinstance(each, type) and name != "logger_class"}
    vars(module).update(made)
    return module

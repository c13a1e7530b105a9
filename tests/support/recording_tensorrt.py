"""A module in place of TensorRT, over the GPU of `recording_cuda`: plans name their inputs, and functions compute them.

Public names are those of the real module (`tests/trt/native` compares them);
whatever begins with `_` is our own.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType
from typing import Any

import numpy as np

from recording_cuda import Gpu
from recording_cuda_bindings import module_of
from trt.graphs import GraphSpec, TensorSpec

VERSION = "11.4.0.106"
#: Computes a graph: inputs by name, bfloat16 widened to float32, to outputs in order.
Compute = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def plan_of(spec: GraphSpec, storage: str) -> bytes:
    """Return the bytes that replace a graph's plan in an engine directory."""
    return json.dumps({**asdict(spec), "storage": storage}).encode()


def tensorrt_module(gpu: Gpu, compute_of: Callable[[str, str], Compute]) -> ModuleType:
    """`compute_of` opens a graph by its name and the storage type of its tokens."""

    class ILogger:
        class Severity(enum.IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2
            INFO = 3
            VERBOSE = 4

        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    class DataType(enum.Enum):
        FLOAT = "float32"
        HALF = "float16"
        BF16 = "bfloat16"
        INT32 = "int32"
        UINT8 = "uint8"

    class ExecutionContextAllocationStrategy(enum.Enum):
        USER_MANAGED = "user"

    class Runtime:
        def __init__(self, logger: Any) -> None:
            gpu.call("Runtime")
            self._logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            gpu.call("deserialize_cuda_engine")
            try:
                plan = json.loads(serialized_engine)
            except ValueError:
                self._logger.log(ILogger.WARNING, "a word ahead")
                self._logger.log(ILogger.ERROR, "magic tag does not match")
                return None
            return ICudaEngine(plan, self._logger)

    class ICudaEngine:
        device_memory_size_v2 = 4096

        def __init__(self, plan: dict[str, Any], logger: Any) -> None:
            self._compute = compute_of(plan["name"], plan["storage"])
            self._inputs, self._outputs = (
                [TensorSpec(**each) for each in plan[side]] for side in ("inputs", "outputs")
            )
            self._tensors = {each.name: each.dtype for each in (*self._inputs, *self._outputs)}
            self._logger = logger

        @property
        def num_io_tensors(self) -> int:
            return len(self._tensors)

        def get_tensor_name(self, index: int) -> str:
            return list(self._tensors)[index]

        def get_tensor_dtype(self, name: str) -> DataType:
            return DataType(self._tensors[name])

        def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Any:
            gpu.call("create_execution_context")
            return None if "no context" in gpu.faults else IExecutionContext(self)

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._is_ready = False

        def set_device_memory(self, memory: int, size: int) -> None:
            gpu.view(memory, size)
            assert memory % 256 == 0
            assert size >= self._engine.device_memory_size_v2

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            gpu.call(f"set_optimization_profile_async {profile_index}")
            assert stream_handle in gpu.streams
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert all(type(each) is int for each in shape)
            self._shapes[name] = shape
            return "no shape" not in gpu.faults

        def set_tensor_address(self, name: str, memory: int) -> bool:
            assert memory % 256 == 0, "TensorRT wants 256 bytes of alignment"
            self._addresses[name] = memory
            return True

        def infer_shapes(self) -> list[str]:
            return [each.name for each in self._engine._inputs if each.name not in self._shapes]

        def execute_async_v3(self, stream_handle: int) -> bool:
            gpu.call("execute_async_v3")
            if "no enqueue" in gpu.faults:
                self._engine._logger.log(ILogger.ERROR, "an illegal memory access was encountered")
                return False
            stream = gpu.streams[stream_handle]
            if stream._captured is not None and "no capture" in gpu.faults:
                stream._invalid = True
                return False
            stream._put(self._run)
            return True

        def _run(self) -> None:
            engine = self._engine
            inputs = {each.name: self._read(each, self._shapes[each.name]) for each in engine._inputs}
            for tensor, values in zip(engine._outputs, engine._compute(inputs), strict=True):
                written = _narrowed(values, tensor.dtype)
                gpu.view(self._addresses[tensor.name], written.nbytes)[:] = written.view(np.uint8).reshape(-1)

        def _read(self, tensor: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
            num_bytes = int(np.prod(shape)) * (2 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).itemsize)
            return _widened(gpu.view(self._addresses[tensor.name], num_bytes), tensor.dtype).reshape(shape)

    return module_of(
        "tensorrt",
        __version__=VERSION,
        **{name: each for name, each in locals().items() if isinstance(each, type) and name != "gpu"},
    )


def _widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return stored.view(dtype).copy()


def _narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return np.ascontiguousarray((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    return np.ascontiguousarray(values, dtype)

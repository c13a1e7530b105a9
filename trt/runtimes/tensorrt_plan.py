"""A plan loaded by TensorRT, and its execution contexts, each for one set of input shapes.

All calls need the plan's device to be current. Knows nothing of CUDA graphs, tokens or queries.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import tensorrt

from trt.contract import EngineBroken, EngineMismatch, EngineUnavailable
from trt.graphs import GraphSpec

log = logging.getLogger(__name__)

_LEVELS = {
    tensorrt.ILogger.INTERNAL_ERROR: logging.ERROR,
    tensorrt.ILogger.ERROR: logging.ERROR,
    tensorrt.ILogger.WARNING: logging.WARNING,
    tensorrt.ILogger.INFO: logging.INFO,
    tensorrt.ILogger.VERBOSE: logging.DEBUG,
}
_TYPES = {
    "uint8": tensorrt.DataType.UINT8,
    "float16": tensorrt.DataType.HALF,
    "bfloat16": tensorrt.DataType.BF16,
    "float32": tensorrt.DataType.FLOAT,
    "int32": tensorrt.DataType.INT32,
}


class TensorRtLog(tensorrt.ILogger):
    """Forwards TensorRT's messages to the log, and keeps the last error, because TensorRT's calls return no reason."""

    def __init__(self) -> None:
        super().__init__()
        self.last_error = "TensorRT gave no reason"

    def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
        level = _LEVELS[severity]
        if level == logging.ERROR:
            self.last_error = msg
        log.log(level, "%s", msg)


class Plan:
    """The loaded plan of one graph of an engine directory."""

    def __init__(self, path: Path, spec: GraphSpec, *, version_compatible: bool) -> None:
        """Reads the file, whose digest the caller has checked.

        Raises `EngineMismatch` for a plan that TensorRT cannot read or whose tensors differ from the graph's, and
        `EngineUnavailable` if TensorRT does not start.
        """
        self._log = TensorRtLog()
        # Kept as long as the engine: TensorRT does not keep the runtime alive.
        try:
            self._runtime = tensorrt.Runtime(self._log)
        except TypeError as error:  # the bindings raise TypeError when the runtime cannot be created
            raise EngineUnavailable(
                f"TensorRT {tensorrt.__version__} does not start here ({self._log.last_error}): it needs a driver that "
                "is at least as new as its CUDA version"
            ) from error
        if version_compatible:
            # A version-compatible plan contains host code, which must be allowed to run.
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineMismatch(f"TensorRT cannot read {path} ({self._log.last_error}): build the engine again")
        self._engine = engine
        tensors = {
            name: engine.get_tensor_dtype(name) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
        }
        expected = {each.name: _TYPES[each.dtype] for each in (*spec.inputs, *spec.outputs)}
        if tensors != expected:
            raise EngineMismatch(
                f"{path} has the tensors {_described(tensors)}, this program needs {_described(expected)}: "
                "build the engine again"
            )
        self.scratch_bytes: int = engine.device_memory_size_v2

    def context(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: int,
        stream: int,
    ) -> Context:
        """Return a context for inputs of these shapes; shapes and addresses never change afterwards.

        `addresses` has the address of every tensor. `scratch` is the address of `scratch_bytes` of memory, which
        contexts may share if only one runs at a time. Raises `EngineBroken` if TensorRT refuses.
        """
        context = self._engine.create_execution_context(tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineBroken(f"TensorRT cannot create a context: {self._log.last_error}")
        context.set_device_memory(scratch, self.scratch_bytes)
        done = context.set_optimization_profile_async(profile, stream)
        for name, shape in shapes.items():
            done = done and context.set_input_shape(name, shape)
        for name, address in addresses.items():
            done = done and context.set_tensor_address(name, address)
        if not done or context.infer_shapes():
            raise EngineBroken(f"TensorRT rejects the shapes {dict(shapes)}: {self._log.last_error}")
        return Context(context, self._log)


class Context:
    """Runs a plan with one set of input shapes."""

    def __init__(self, context: tensorrt.IExecutionContext, plan_log: TensorRtLog) -> None:
        self._context = context
        self._log = plan_log

    def enqueue(self, stream: int) -> None:
        """Enqueue a run on a stream. Raises `EngineBroken` if TensorRT fails."""
        if not self._context.execute_async_v3(stream):
            raise EngineBroken(f"TensorRT failed to run the plan: {self._log.last_error}")


def _described(tensors: Mapping[str, tensorrt.DataType]) -> str:
    return ", ".join(f"{name} {dtype.name}" for name, dtype in sorted(tensors.items()))

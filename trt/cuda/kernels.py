"""The kernel that copies numbered rows of bytes to numbered rows; all other kernels belong to the plans.

NVRTC compiles it at load time, because a machine that runs engines has no nvcc. Knows nothing of tokens.
"""

from __future__ import annotations

from typing import Any

import pycuda.driver as cuda
from cuda.bindings import nvrtc

from trt.contract import EngineUnavailable

#: Bytes that one thread copies in one step; the first size that divides the row length is used.
VECTOR_BYTES = (16, 4, 1)
#: Offsets may exceed 2^31 bytes. The source may be pinned host memory. A null list of row numbers means 0, 1, 2, ...
COPY_ROWS = r"""
template <typename Vector>
__device__ void copy_rows(
    const Vector *source, Vector *target, const int *source_rows, const int *target_rows, int num_rows, int row_vectors)
{
    for (int row = blockIdx.y; row < num_rows; row += gridDim.y) {
        const Vector *from = source + (long long)(source_rows ? source_rows[row] : row) * row_vectors;
        Vector *to = target + (long long)(target_rows ? target_rows[row] : row) * row_vectors;
        for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < row_vectors; at += gridDim.x * blockDim.x)
            to[at] = from[at];
    }
}

#define COPY_ROWS(bytes, Vector)                                                                                  \
    extern "C" __global__ void copy_rows_##bytes(                                                                 \
        const Vector *source, Vector *target, const int *source_rows, const int *target_rows, int num_rows,       \
        int row_vectors)                                                                                          \
    {                                                                                                             \
        copy_rows(source, target, source_rows, target_rows, num_rows, row_vectors);                               \
    }

COPY_ROWS(16, uint4)
COPY_ROWS(4, unsigned int)
COPY_ROWS(1, unsigned char)
"""
_BLOCK_THREADS = 256
_MAX_GRID_ROWS = 65_535  # of a grid's second dimension


class RowCopier:
    """Copies rows of any length on the device that was current at construction."""

    def __init__(self, compute_capability: tuple[int, int]) -> None:
        # Kept, because pycuda unloads a module, with its functions, when the last reference is gone.
        self._module = cuda.module_from_buffer(compiled(COPY_ROWS, compute_capability))
        self._functions = {
            size: self._module.get_function(f"copy_rows_{size}").prepare("PPPPii") for size in VECTOR_BYTES
        }

    def copy(
        self,
        source: int,
        target: int,
        *,
        num_rows: int,
        row_bytes: int,
        source_rows: int = 0,
        target_rows: int = 0,
        stream: cuda.Stream,
    ) -> None:
        """Enqueue the copy of `num_rows` rows of `row_bytes` from the address `source` to the address `target`.

        `source_rows` and `target_rows` are addresses of int32 row numbers, or 0 for rows one after the other.
        """
        vector_bytes = next(size for size in VECTOR_BYTES if row_bytes % size == 0)
        row_vectors = row_bytes // vector_bytes
        grid = (-(-row_vectors // _BLOCK_THREADS), min(num_rows, _MAX_GRID_ROWS), 1)
        self._functions[vector_bytes].prepared_async_call(
            grid, (_BLOCK_THREADS, 1, 1), stream, source, target, source_rows, target_rows, num_rows, row_vectors
        )


def compiled(source: str, compute_capability: tuple[int, int]) -> bytes:
    """Compile CUDA C++ to machine code for a GPU.

    Raises `EngineUnavailable` where NVRTC is missing or too old for the GPU.
    """
    options = [b"--gpu-architecture=sm_%d%d" % compute_capability]
    try:
        program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"copy_rows.cu", 0, [], []))
        result, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise EngineUnavailable(f"the row copy does not compile: {log.rstrip(bytes(1)).decode()}")
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        _checked(nvrtc.nvrtcDestroyProgram(program))
    except (OSError, RuntimeError) as error:  # the library is loaded at the first call
        raise EngineUnavailable(f"NVRTC cannot be used (install nvidia-cuda-nvrtc): {error}") from error
    return bytes(code)


def _checked(answer: tuple[Any, ...]) -> Any:
    """Return the value of an NVRTC call. Raises `EngineUnavailable` if the call failed."""
    result, *values = answer
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineUnavailable(f"NVRTC answers {result.name}: its version has to fit the driver's and the GPU's")
    return values[0] if values else None

"""The modules in place of cuda-bindings that `recording_cuda` hands out: CUDA graphs and the compiler of kernels."""

from __future__ import annotations

import enum
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recording_cuda import Gpu

#: What kernels are compiled to.
CODE = b"machine code"


def module_of(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def bindings_driver(gpu: Gpu) -> ModuleType:
    class CUresult(enum.IntEnum):
        CUDA_SUCCESS = 0
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
        CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901

    class CUstream_flags(enum.IntEnum):
        CU_STREAM_NON_BLOCKING = 1

    class CUstreamCaptureMode(enum.IntEnum):
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1

    class CUstream:
        def __init__(self, init_value: int) -> None:
            self._stream = gpu.streams[init_value]

    def result_of(name: str) -> CUresult:
        gpu.calls.append(name)
        return CUresult(gpu.faults.get(name, CUresult.CUDA_SUCCESS))

    def cuStreamBeginCapture(hStream: CUstream, mode: CUstreamCaptureMode) -> tuple[CUresult]:
        result = result_of("cuStreamBeginCapture")
        if result == CUresult.CUDA_SUCCESS:
            assert not hStream._stream._waiting, "what is captured must not depend on what was before"
            hStream._stream._captured = []
        return (result,)

    def cuStreamEndCapture(hStream: CUstream) -> tuple[CUresult, Any]:
        result, stream = result_of("cuStreamEndCapture"), hStream._stream
        captured, stream._captured = stream._captured, None
        if stream._invalid:
            result, stream._invalid = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, False
        return result, (captured if result == CUresult.CUDA_SUCCESS else None)

    def cuGraphInstantiate(hGraph: Any, flags: int) -> tuple[CUresult, Any]:
        return result_of("cuGraphInstantiate"), hGraph

    def cuGraphDestroy(hGraph: Any) -> tuple[CUresult]:
        return (result_of("cuGraphDestroy"),)

    def cuGraphLaunch(hGraphExec: Any, hStream: CUstream) -> tuple[CUresult]:
        for work in hGraphExec:
            hStream._stream._put(work)
        return (result_of("cuGraphLaunch"),)

    public = {name: each for name, each in locals().items() if name.startswith(("CU", "cu"))}
    return module_of("cuda.bindings.driver", **public)


def bindings_nvrtc(gpu: Gpu) -> ModuleType:
    class nvrtcResult(enum.IntEnum):
        NVRTC_SUCCESS = 0
        NVRTC_ERROR_COMPILATION = 6
        NVRTC_ERROR_INVALID_OPTION = 5

    def result_of(name: str) -> nvrtcResult:
        gpu.calls.append(name)
        return nvrtcResult(gpu.faults.get(name, nvrtcResult.NVRTC_SUCCESS))

    def nvrtcCreateProgram(src: bytes, name: bytes, numHeaders: int, headers: Any, includeNames: Any) -> Any:
        return result_of("nvrtcCreateProgram"), src

    def nvrtcCompileProgram(prog: Any, numOptions: int, options: list[bytes]) -> Any:
        assert options == [b"--gpu-architecture=sm_90"]
        return (result_of("nvrtcCompileProgram"),)

    def nvrtcGetProgramLogSize(prog: Any) -> Any:
        return result_of("nvrtcGetProgramLogSize"), len(b"no such type\0")

    def nvrtcGetProgramLog(prog: Any, log: bytearray) -> Any:
        log[:] = b"no such type\0"
        return (result_of("nvrtcGetProgramLog"),)

    def nvrtcGetCUBINSize(prog: Any) -> Any:
        return result_of("nvrtcGetCUBINSize"), len(CODE)

    def nvrtcGetCUBIN(prog: Any, cubin: bytearray) -> Any:
        cubin[:] = CODE
        return (result_of("nvrtcGetCUBIN"),)

    def nvrtcDestroyProgram(prog: Any) -> Any:
        return (result_of("nvrtcDestroyProgram"),)

    return module_of(
        "cuda.bindings.nvrtc", **{name: each for name, each in locals().items() if name.startswith("nvrtc")}
    )

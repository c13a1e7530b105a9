"""A GPU in host memory, and modules in place of pycuda and cuda-bindings that speak to it.

It is as lazy as a GPU may be: what is put on a stream happens when somebody waits for it, and no sooner. So a copy out
of memory that is written again too early, or a stream that does not wait for another, shows in the numbers. Memory is
garbage until it is written, and every access has to lie inside of one allocation.
Public names are those of the real modules (`tests/trt/native` compares them); whatever begins with `_` is our own.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from recording_cuda_bindings import CODE, bindings_driver, bindings_nvrtc, module_of

_GARBAGE = 0xA5


class Gpu:
    """One machine's GPUs, all alike; the modules of `cuda_modules` record here what they are asked."""

    def __init__(self, *, num_devices: int = 1, memory_bytes: int = 1 << 30) -> None:
        self.name, self.compute_capability = "NVIDIA Recorded", (9, 0)
        self.num_devices = num_devices
        self.free_bytes = memory_bytes
        self.calls: list[str] = []
        self.faults: dict[str, Any] = {}  # what the call of that name raises, or answers
        self.errors: Any = None  # the module whose errors the calls raise
        self.streams: dict[int, Any] = {}  # by handle
        self.by_default: list[Callable[[], None]] = []  # work of no stream, which the streams do not wait for
        self.pushed = threading.local()  # contexts that are current on a thread
        self.lock = threading.RLock()  # one of several threads that wait lets things happen
        self._memory: dict[int, np.ndarray] = {}  # by address

    def call(self, name: str) -> None:
        """Record a call, and fail it if it is to fail."""
        self.calls.append(name)
        if name in self.faults:
            raise self.faults[name]

    def allocate(self, num_bytes: int) -> np.ndarray:
        """Memory at an address that is a multiple of 256, as the driver gives it."""
        padded = np.full(num_bytes + 256, _GARBAGE, np.uint8)
        memory = padded[-padded.ctypes.data % 256 :][:num_bytes]
        self._memory[memory.ctypes.data] = memory
        return memory

    def view(self, address: int, num_bytes: int) -> np.ndarray:
        """The bytes there. An access out of bounds fails the test instead of the process."""
        for start, memory in list(self._memory.items()):  # another thread may allocate
            if start <= address and address + num_bytes <= start + len(memory):
                return memory[address - start :][:num_bytes]
        raise AssertionError(f"{num_bytes} bytes at {address:#x} are not inside one allocation")

    def is_allocated(self, array: np.ndarray) -> bool:
        address = array.ctypes.data
        return any(start <= address < start + len(memory) for start, memory in list(self._memory.items()))


def cuda_modules(gpu: Gpu) -> dict[str, ModuleType]:
    """The modules to import instead, by name."""
    driver, bindings, nvrtc = _pycuda_driver(gpu), bindings_driver(gpu), bindings_nvrtc(gpu)
    gpu.errors = driver
    return {
        "pycuda": module_of("pycuda", driver=driver),
        "pycuda.driver": driver,
        "pycuda.tools": module_of("pycuda.tools", DeviceMemoryPool=driver._DeviceMemoryPool),
        "cuda": module_of("cuda"),
        "cuda.bindings": module_of("cuda.bindings", driver=bindings, nvrtc=nvrtc),
        "cuda.bindings.driver": bindings,
        "cuda.bindings.nvrtc": nvrtc,
    }


def _pycuda_driver(gpu: Gpu) -> ModuleType:
    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    class LogicError(Error):
        pass

    class LaunchError(Error):
        pass

    class RuntimeError(Error):
        pass

    def in_context(name: str) -> None:
        gpu.call(name)
        if not getattr(gpu.pushed, "contexts", None):
            raise LogicError(f"{name}: no currently active context?")

    def init() -> None:
        gpu.call("init")

    class Context:
        def push(self) -> None:
            gpu.pushed.contexts = [*getattr(gpu.pushed, "contexts", []), self]

        @staticmethod
        def pop() -> None:
            gpu.pushed.contexts.pop()

        @staticmethod
        def synchronize() -> None:
            in_context("Context.synchronize")
            for work in gpu.by_default:
                work()
            gpu.by_default.clear()
            for stream in gpu.streams.values():
                stream.synchronize()

    class Device:
        def __init__(self, number: int) -> None:
            assert 0 <= number < gpu.num_devices

        @staticmethod
        def count() -> int:
            gpu.call("Device.count")
            return gpu.num_devices

        def name(self) -> str:
            return gpu.name

        def compute_capability(self) -> tuple[int, int]:
            return gpu.compute_capability

        def retain_primary_context(self) -> Context:
            gpu.call("retain_primary_context")
            return Context()

    class DeviceAllocation:
        def __init__(self, memory: np.ndarray) -> None:
            self._memory = memory

        def __int__(self) -> int:
            return self._memory.ctypes.data

    def mem_alloc(num_bytes: int) -> DeviceAllocation:
        in_context("mem_alloc")
        if not 0 < num_bytes <= gpu.free_bytes:
            raise MemoryError("cuMemAlloc failed: out of memory")
        gpu.free_bytes -= num_bytes
        return DeviceAllocation(gpu.allocate(num_bytes))

    class DeviceMemoryPool:
        def __init__(self) -> None:
            in_context("DeviceMemoryPool")
            self._free: dict[int, list[np.ndarray]] = {}

        def allocate(self, size: int) -> Any:
            in_context("DeviceMemoryPool.allocate")
            return _Pooled(self, size)

    class _Pooled:
        """Memory that is given out again at once when its holder lets it go."""

        def __init__(self, pool: DeviceMemoryPool, num_bytes: int) -> None:
            self._pool = pool
            free = pool._free.setdefault(num_bytes, [])
            self._memory = free.pop() if free else gpu.allocate(num_bytes)

        def __int__(self) -> int:
            return self._memory.ctypes.data

        def __del__(self) -> None:
            self._pool._free[len(self._memory)].append(self._memory)

    class PagelockedHostAllocation:
        def __init__(self, memory: np.ndarray) -> None:
            self._memory = memory
            self.__array_interface__ = memory.__array_interface__

        def get_device_pointer(self) -> int:
            return self._memory.ctypes.data

    def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        in_context("pagelocked_empty")
        assert mem_flags & host_alloc_flags.DEVICEMAP, "the device is to read it"
        memory = gpu.allocate(int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
        return np.asarray(PagelockedHostAllocation(memory))  # which is then the array's base

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            in_context("Stream")
            self._waiting: deque[Callable[[], None]] = deque()
            self._captured: list[Callable[[], None]] | None = None
            self._invalid = False
            self.handle = 0x1000 + 16 * len(gpu.streams)
            gpu.streams[self.handle] = self

        def synchronize(self) -> None:
            in_context("Stream.synchronize")
            self._forbid_in_capture()
            self._run_until(lambda: not self._waiting)

        def wait_for_event(self, event: Event) -> None:
            in_context("Stream.wait_for_event")
            mark = event._mark
            self._put(lambda: mark.stream._run_until(lambda: mark.passed))

        def _put(self, work: Callable[[], None]) -> None:
            (self._waiting if self._captured is None else self._captured).append(work)

        def _run_until(self, done: Callable[[], bool]) -> None:
            with gpu.lock:
                while not done():
                    self._waiting.popleft()()

        def _forbid_in_capture(self) -> None:
            if self._captured is not None:
                self._invalid = True
                raise LogicError("operation not permitted when stream is capturing")

    class Event:
        def __init__(self, flags: int = 0) -> None:
            in_context("Event")
            self._has_time = flags != event_flags.DISABLE_TIMING

        def record(self, stream: Stream) -> Event:
            in_context("Event.record")
            mark = self._mark = SimpleNamespace(stream=stream, passed=False)
            stream._put(lambda: setattr(mark, "passed", True))
            return self

        def synchronize(self) -> Event:
            in_context("Event.synchronize")
            self._mark.stream._forbid_in_capture()
            self._mark.stream._run_until(lambda: self._mark.passed)
            return self

        def time_till(self, event: Event) -> float:
            assert self._has_time
            assert event._has_time
            if not (self._mark.passed and event._mark.passed):
                raise RuntimeError("cuEventElapsedTime failed: device not ready")
            return 0.25

    def memset_d8(dest: int, data: int, size: int) -> None:
        in_context("memset_d8")
        gpu.by_default.append(lambda: gpu.view(dest, size).fill(data))

    def pinned_bytes(array: np.ndarray) -> np.ndarray:
        assert gpu.is_allocated(array), "an asynchronous copy needs pinned memory"
        return gpu.view(array.ctypes.data, array.nbytes)

    def memcpy_htod_async(dest: int, src: np.ndarray, stream: Stream) -> None:
        in_context("memcpy_htod_async")
        source, target = pinned_bytes(src), gpu.view(dest, src.nbytes)
        stream._put(lambda: np.copyto(target, source))

    def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Stream) -> None:
        in_context("memcpy_dtoh_async")
        source, target = gpu.view(src, dest.nbytes), pinned_bytes(dest)
        stream._put(lambda: np.copyto(target, source))

    def memcpy_dtod_async(dest: int, src: int, size: int, stream: Stream) -> None:
        in_context("memcpy_dtod_async")
        source, target = gpu.view(src, size), gpu.view(dest, size)
        stream._put(lambda: np.copyto(target, source))

    class Function:
        def __init__(self, name: str) -> None:
            self._vector_bytes = int(name.removeprefix("copy_rows_"))

        def prepare(self, arg_types: str) -> Function:
            assert arg_types == "PPPPii"
            return self

        def prepared_async_call(self, grid: Any, block: Any, stream: Stream, *args: int) -> None:
            in_context("launch")
            assert grid[0] > 0
            assert 0 < grid[1] < 1 << 16
            assert 0 < block[0] <= 1024
            stream._put(lambda: self._copy(*args))

        def _copy(self, source: int, target: int, source_rows: int, target_rows: int, num: int, vectors: int) -> None:
            row_bytes = vectors * self._vector_bytes
            assert source % self._vector_bytes == target % self._vector_bytes == 0, "misaligned"
            froms, tos = (
                gpu.view(rows, 4 * num).view(np.int32).tolist() if rows else range(num)
                for rows in (source_rows, target_rows)
            )
            for row_from, row_to in zip(froms, tos, strict=True):
                row = gpu.view(source + row_from * row_bytes, row_bytes)
                gpu.view(target + row_to * row_bytes, row_bytes)[:] = row

    class Module:
        def get_function(self, name: str) -> Function:
            return Function(name)

    def module_from_buffer(buffer: bytes) -> Module:
        in_context("module_from_buffer")
        assert bytes(buffer) == CODE
        return Module()

    class event_flags(enum.IntEnum):
        DISABLE_TIMING = 2

    class host_alloc_flags:
        DEVICEMAP = 2

    public = {name: each for name, each in locals().items() if name not in ("gpu", "in_context", "pinned_bytes")}
    pool = public.pop("DeviceMemoryPool")
    return module_of("pycuda.driver", _DeviceMemoryPool=pool, **{k: v for k, v in public.items() if k[0] != "_"})

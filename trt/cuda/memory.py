"""Memory of the device, and host memory that the device reads and writes by itself. Knows bytes only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pycuda.driver as cuda
from numpy.typing import DTypeLike, NDArray

from trt.contract import EngineUnavailable

Scalar = TypeVar("Scalar", bound=np.generic)
#: Where pieces of a pinned buffer begin: at a multiple of what any of our types and a copy likes.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Pinned(Generic[Scalar]):
    """Page-locked host memory: for numpy an array, for the device an address."""

    array: NDArray[Scalar]
    address: int


def device_memory(num_bytes: int, remedy: str) -> cuda.DeviceAllocation:
    """Zeroed memory on the device that is current. Raises `EngineUnavailable` with the remedy if it does not fit."""
    try:
        memory: cuda.DeviceAllocation = cuda.mem_alloc(max(num_bytes, 1))  # the driver gives no memory of no size
    except cuda.MemoryError as error:
        raise EngineUnavailable(f"{remedy} ({num_bytes / 1e9:.1f} GB)") from error
    cuda.memset_d8(int(memory), 0, max(num_bytes, 1))
    # Zeroing goes to a stream that ours do not wait for, and may come after what they write.
    cuda.Context.synchronize()
    return memory


def pinned_memory(shape: tuple[int, ...], dtype: DTypeLike, remedy: str) -> Pinned[Any]:
    """Zeroed host memory that the device can reach. Raises `EngineUnavailable` with the remedy if it does not fit."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        memory = cuda.pagelocked_empty(max(num_bytes, 1), np.uint8, mem_flags=cuda.host_alloc_flags.DEVICEMAP)
    except cuda.MemoryError as error:
        raise EngineUnavailable(f"{remedy} ({num_bytes / 1e9:.1f} GB of pinned memory)") from error
    memory.fill(0)
    address = int(memory.base.get_device_pointer())
    return Pinned(memory[:num_bytes].view(dtype).reshape(shape), address)


class UploadRing:
    """Carries small arrays to the device without waiting for each: they lie in pinned memory until they are copied.

    Used with one stream. When the end is reached, everything enqueued there is waited for, which at that point has
    mostly happened.
    """

    def __init__(self, num_bytes: int, stream: cuda.Stream) -> None:
        """`num_bytes` is at least as much as the largest array."""
        self._memory = pinned_memory((num_bytes,), np.uint8, "no memory for what goes to the device")
        self._stream = stream
        self._next_byte = 0

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Enqueue the copy of an array to an address of the device; the array may be changed at once."""
        if self._next_byte + array.nbytes > len(self._memory.array):
            self._stream.synchronize()
            self._next_byte = 0
        piece = self._memory.array[self._next_byte : self._next_byte + array.nbytes]
        piece[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        cuda.memcpy_htod_async(address, piece, self._stream)
        self._next_byte += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT

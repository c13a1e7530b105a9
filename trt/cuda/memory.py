"""Allocates memory on the device, and pinned host memory that the device can access. Knows bytes only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pycuda.driver as cuda
from numpy.typing import DTypeLike, NDArray

from trt.contract import EngineUnavailable

Scalar = TypeVar("Scalar", bound=np.generic)
#: Alignment of the pieces of a pinned buffer in bytes, enough for every data type and for fast copies.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Pinned(Generic[Scalar]):
    """Page-locked host memory: an array for numpy, an address for the device."""

    array: NDArray[Scalar]
    address: int


def device_memory(num_bytes: int, remedy: str) -> cuda.DeviceAllocation:
    """Return zeroed memory on the current device. Raises `EngineUnavailable` with the remedy if it does not fit."""
    try:
        memory: cuda.DeviceAllocation = cuda.mem_alloc(max(num_bytes, 1))  # the driver refuses size 0
    except cuda.MemoryError as error:
        raise EngineUnavailable(f"{remedy} ({num_bytes / 1e9:.1f} GB)") from error
    cuda.memset_d8(int(memory), 0, max(num_bytes, 1))
    # Zeroing runs on the default stream. Without this wait it could overwrite data written by other streams.
    cuda.Context.synchronize()
    return memory


def pinned_memory(shape: tuple[int, ...], dtype: DTypeLike, remedy: str) -> Pinned[Any]:
    """Return zeroed, pinned host memory. Raises `EngineUnavailable` with the remedy if it does not fit."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        memory = cuda.pagelocked_empty(max(num_bytes, 1), np.uint8, mem_flags=cuda.host_alloc_flags.DEVICEMAP)
    except cuda.MemoryError as error:
        raise EngineUnavailable(f"{remedy} ({num_bytes / 1e9:.1f} GB of pinned memory)") from error
    memory.fill(0)
    address = int(memory.base.get_device_pointer())
    return Pinned(memory[:num_bytes].view(dtype).reshape(shape), address)


class UploadRing:
    """Copies small arrays to the device asynchronously through a ring of pinned memory.

    Used with one stream. When the end of the ring is reached, the stream is synchronised before the memory is reused;
    by then most copies have ended.
    """

    def __init__(self, num_bytes: int, stream: cuda.Stream) -> None:
        """`num_bytes` must be at least the size of the largest array."""
        self._memory = pinned_memory((num_bytes,), np.uint8, "no memory for uploads to the device")
        self._stream = stream
        self._next_byte = 0

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Enqueue the copy of an array to a device address; the caller may change the array afterwards."""
        if self._next_byte + array.nbytes > len(self._memory.array):
            self._stream.synchronize()
            self._next_byte = 0
        piece = self._memory.array[self._next_byte : self._next_byte + array.nbytes]
        piece[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        cuda.memcpy_htod_async(address, piece, self._stream)
        self._next_byte += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT

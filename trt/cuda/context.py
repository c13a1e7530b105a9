"""A GPU and the context to call it in: opened without side effects, current only while somebody uses it.

Every other module that touches the device is called inside `CudaDevice.current()`. Knows nothing of engines, tokens or
TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pycuda.driver as cuda
from cuda.bindings import driver

from trt.contract import EngineBroken, EngineUnavailable

#: Streams that do not wait for the legacy default stream, which other libraries of the process may use.
NON_BLOCKING = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)


class CudaDevice:
    """A device and its primary context, which it shares with TensorRT (and with torch, in a process that has both)."""

    def __init__(self, ordinal: int) -> None:
        """Raises `EngineUnavailable` without a driver or such a device."""
        try:
            cuda.init()
            num_devices = cuda.Device.count()
        except cuda.Error as error:
            raise EngineUnavailable(
                f"no GPU can be used here ({error}): install the driver, or choose torch"
            ) from error
        if ordinal >= num_devices:
            raise EngineUnavailable(f"GPU {ordinal} was asked for and there are {num_devices}, counted from 0")
        device = cuda.Device(ordinal)
        self.name: str = device.name()
        major, minor = device.compute_capability()
        self.compute_capability = (int(major), int(minor))
        with broken_device():
            self._context = device.retain_primary_context()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current on this thread; what the device refuses in the meantime is `EngineBroken`.

        For each call anew and not once per thread: a thread that ends with a context still pushed takes the process
        with it, and threads are the caller's. It costs two microseconds.
        """
        with broken_device():
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()


class StreamEvent:
    """A mark in a stream, with the time it was passed at."""

    def __init__(self, stream: cuda.Stream) -> None:
        self._stream = stream
        self._event = cuda.Event()

    def record(self) -> None:
        self._event.record(self._stream)

    def synchronize(self) -> None:
        """Wait until the stream has passed this mark."""
        self._event.synchronize()

    def elapsed_time(self, end_event: StreamEvent, /) -> float:
        """Milliseconds from this mark to the other; both must have been passed."""
        return float(self._event.time_till(end_event._event))


def device_ordinal(device: str) -> int:
    """The number in "cuda:1"; 0 for "cuda". Raises `EngineUnavailable` for anything else."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise EngineUnavailable(f"TensorRT does not run on {device!r}: choose cuda or cuda:N")
    return int(number or 0)


@contextmanager
def broken_device() -> Iterator[None]:
    """A device out of memory or in a sticky error stays so, and no other refusal has a remedy here: end the process."""
    try:
        yield
    except cuda.Error as error:
        raise EngineBroken(f"the device failed: {error}") from error

"""A GPU and its CUDA context, which is current on a thread only during a call.

All other modules that use the device are called inside `CudaDevice.current()`. Knows nothing of engines, tokens or
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
    """A device and its primary context, which is shared with TensorRT and with torch."""

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
            raise EngineUnavailable(f"there is no GPU {ordinal}: this machine has {num_devices}, counted from 0")
        device = cuda.Device(ordinal)
        self.name: str = device.name()
        major, minor = device.compute_capability()
        self.compute_capability = (int(major), int(minor))
        with broken_device():
            self._context = device.retain_primary_context()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current on this thread; translates CUDA errors inside the block to `EngineBroken`.

        The context is pushed for each call and not once per thread, because a thread that ends with a pushed context
        ends the process. A push costs two microseconds.
        """
        with broken_device():
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()


class StreamEvent:
    """A CUDA event in one stream, with a time stamp."""

    def __init__(self, stream: cuda.Stream) -> None:
        self._stream = stream
        self._event = cuda.Event()

    def record(self) -> None:
        self._event.record(self._stream)

    def synchronize(self) -> None:
        """Wait until the stream has reached this event."""
        self._event.synchronize()

    def elapsed_time(self, end_event: StreamEvent, /) -> float:
        """Return the milliseconds from this event to the other; the stream must have reached both."""
        return float(self._event.time_till(end_event._event))


def device_ordinal(device: str) -> int:
    """Return the number in "cuda:1", and 0 for "cuda". Raises `EngineUnavailable` for any other name."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise EngineUnavailable(f"TensorRT does not run on {device!r}: choose cuda or cuda:N")
    return int(number or 0)


@contextmanager
def broken_device() -> Iterator[None]:
    """Translate every CUDA error to `EngineBroken`: none of them can be repaired without ending the process."""
    try:
        yield
    except cuda.Error as error:
        raise EngineBroken(f"the device failed: {error}") from error

"""The device operations of the torch runtime besides tensors: current device, events, transfers, recording.

The engine receives them as an argument, so that its logic can be tested on a CPU. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trt.contract import DeviceCopies, EngineBroken, EngineUnavailable
from trt.cuda.copy_clock import CopyClock, TimingEvent

#: Runs work once and returns a function that repeats it on the same memory. Raises `RuntimeError` for work that cannot
#: be recorded.
Record = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class TorchDevice:
    """A torch device and the calls that depend on its kind."""

    device: torch.device
    current: Callable[[], AbstractContextManager[object]] = nullcontext  # makes the device current on this thread
    make_event: Callable[[], TimingEvent] | None = None  # None: host and device are one
    record: Record | None = None  # None: work is not recorded


def torch_device(device: torch.device) -> TorchDevice:
    """Return the operations of a CPU, or of a CUDA device whose work is recorded in CUDA graphs."""
    if device.type == "cpu":
        return TorchDevice(device)

    def current() -> AbstractContextManager[object]:
        return torch.cuda.device(device)

    def make_event() -> TimingEvent:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    return TorchDevice(device, current, make_event, CudaRecorder(device))


class CudaRecorder:
    """Records work as CUDA graphs; all graphs share one pool of memory, because only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            # Run once on another stream: libraries initialise themselves in the first run, which cannot be recorded.
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another thread may fill the slab during the capture: only this thread may not synchronise.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        return graph.replay


class Transfers:
    """Copies between numpy and a device, timed where the two have separate memory."""

    def __init__(self, device: TorchDevice) -> None:
        self._device = device.device
        self._clock = None if device.make_event is None else CopyClock(device.make_event)

    def start_call(self) -> None:
        """Discard the times of the previous call."""
        if self._clock is not None:
            self._clock.start()

    def upload(self, numbers: NDArray[Any]) -> Tensor:
        with nullcontext() if self._clock is None else self._clock.to_device():
            return torch.tensor(numbers).to(self._device)

    def download(self, tensor: Tensor) -> NDArray[np.float32]:
        with nullcontext() if self._clock is None else self._clock.to_host():
            return to_numpy(tensor)

    def last_copies(self) -> DeviceCopies | None:
        """Return the copy times of the last call; None if host and device share one memory.

        Call it only after the call's results have arrived on the host.
        """
        return None if self._clock is None else self._clock.copies()


def to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", tensor.float().cpu().numpy())


def named_device(name: str) -> torch.device:
    """Return the torch device of this name. Raises `EngineUnavailable` for a device that torch cannot use here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineUnavailable(f"unknown device {name!r}: choose cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineUnavailable(f"the torch engine does not run on {name!r}: choose cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineUnavailable(
            f"device {name!r} is not available, torch finds {torch.cuda.device_count()} CUDA devices: "
            "choose cpu, or install torch's CUDA build and the driver"
        )
    return device


def device_name(device: torch.device) -> str:
    """Return the device's model name for the engine digest: different models round differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 if the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    in_hardware = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if in_hardware else torch.float32


@contextmanager
def broken_device() -> Iterator[None]:
    """Translate an out-of-memory or sticky device error, which cannot be repaired, to `EngineBroken`."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        raise EngineBroken(f"the device failed: {str(error).splitlines()[0]}") from error

"""The token slabs of the torch runtime: host memory shared with numpy, and device memory behind a staging ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols.quantize import restore
from trt.contract import EngineUnavailable, TokenSlab
from trt.slab.host import HostSlab
from trt.slab.layout import SlotLayout
from trt.slab.staging import STAGING_ROWS, FillEvent, StagedSlab


class GatherSlab(TokenSlab, Protocol):
    """A slab whose slots can be gathered on the device that computes."""

    layout: SlotLayout
    num_slots: int
    versions: NDArray[np.uint32]

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:  # (B,) -> uint8 (B, token bytes), (B, scale bytes)
        ...

    def wait_for_published(self) -> None:
        """Make the device's current stream wait for the last publication."""
        ...


class SharedSlab(HostSlab):
    """Host memory that both numpy and torch address, for an engine on a CPU."""

    def __init__(self, layout: SlotLayout, num_slots: int) -> None:
        super().__init__(layout, num_slots)
        self._tokens = torch.from_numpy(self.tokens)
        self._scales = torch.from_numpy(self.scales)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self._tokens.index_select(0, slots), self._scales.index_select(0, slots)

    def wait_for_published(self) -> None:
        """Nothing to wait for: a published slot is already written."""


class FillStream(Protocol):
    """A stream of a torch device that fills slots while another stream computes."""

    def current(self) -> AbstractContextManager[object]:
        """Make the device current on this thread."""
        ...

    def enqueue(self, work: Callable[[], None]) -> None:
        """Enqueue work on this stream; it may run later."""
        ...

    def record_event(self) -> FillEvent:
        """Record an event after the work enqueued so far."""
        ...

    def wait_on_device(self, event: Any) -> None:
        """Make the device's current stream, which computes, wait for an event of this stream."""
        ...


class CudaFillStream:
    """A non-blocking stream of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with self.current():
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device)

    def enqueue(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record_event(self) -> FillEvent:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait_on_device(self, event: Any) -> None:
        torch.cuda.current_stream().wait_event(event)


class DeviceSlab(StagedSlab[FillEvent]):
    """Device memory filled through pinned rows. The bytes of empty slots are zero."""

    def __init__(
        self,
        layout: SlotLayout,
        num_slots: int,
        device: torch.device,
        stream: FillStream,
        num_rows: int = STAGING_ROWS,
    ) -> None:
        super().__init__(layout, num_slots, num_rows)
        self._stream = stream
        with stream.current():
            self._tokens = torch.zeros((num_slots, layout.token_bytes), dtype=torch.uint8, device=device)
            self._scales = torch.zeros((num_slots, layout.scale_bytes), dtype=torch.uint8, device=device)
            pinned: dict[str, Any] = {"pin_memory": device.type == "cuda" and self.num_rows > 0}
            self._row_tokens = torch.zeros((self.num_rows, layout.token_bytes), dtype=torch.uint8, **pinned)
            self._row_scales = torch.zeros((self.num_rows, layout.scale_bytes), dtype=torch.uint8, **pinned)
            self._row_slots = torch.zeros(self.num_rows, dtype=torch.int32, **pinned)
            if device.type == "cuda":
                # Zeroing runs on the computing stream, for which the fill stream does not wait.
                torch.cuda.synchronize()
        self.row_tokens, self.row_scales = self._row_tokens.numpy(), self._row_scales.numpy()
        self.row_slots = self._row_slots.numpy()

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self._tokens.index_select(0, slots), self._scales.index_select(0, slots)

    def wait_for_published(self) -> None:
        if self.published is not None:
            self._stream.wait_on_device(self.published)

    def _current(self) -> AbstractContextManager[object]:
        return self._stream.current()

    def _copy_rows(self, rows: range) -> None:
        part = slice(rows.start, rows.stop)

        def copy() -> None:
            slots = self._row_slots[part].to(self._tokens.device, non_blocking=True).long()
            for staged, slab in ((self._row_tokens, self._tokens), (self._row_scales, self._scales)):
                slab.index_copy_(0, slots, staged[part].to(slab.device, non_blocking=True))

        self._stream.enqueue(copy)

    def _record_event(self) -> FillEvent:
        return self._stream.record_event()


def dequantize(layout: SlotLayout, tokens: Tensor, scales: Tensor) -> Tensor:
    """Convert stored bytes, uint8 (B, token bytes) and (B, scale bytes), to float32 (B, m, d)."""
    num_tokens = layout.num_tokens
    if layout.storage in ("fp16", "bf16"):
        stored = tokens.view(torch.float16 if layout.storage == "fp16" else torch.bfloat16)
        return stored.view(len(tokens), num_tokens, layout.token_dim).float()
    is_int8 = layout.storage == "int8"
    values = tokens.view(torch.int8) if is_int8 else tokens.float()
    steps = scales.view(torch.float32) if is_int8 else scales.view(torch.float16).float()
    if not is_int8:
        steps = steps.view(len(tokens), num_tokens, -1)
    restored: Tensor = restore(layout.storage, values.view(len(tokens), num_tokens, -1), steps, torch.stack)
    return restored


def build_slab(layout: SlotLayout, num_slots: int, device: torch.device) -> GatherSlab:
    """Return a slab on a device. Raises `EngineUnavailable` if it does not fit in memory."""
    if device.type == "cpu":
        return SharedSlab(layout, num_slots)
    with _enough_memory(num_slots, device):
        return DeviceSlab(layout, num_slots, device, CudaFillStream(device))


@contextmanager
def _enough_memory(num_slots: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:  # out of device memory, and out of pinned memory
        raise EngineUnavailable(f"no memory for {num_slots} slots on {device}: ask for fewer slots") from error

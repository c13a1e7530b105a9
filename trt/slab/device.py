"""The token slab of the TensorRT runtime, in device memory through pycuda.

Slots are filled on the slab's own stream and gathered on the stream that computes. Knows bytes only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import pycuda.driver as cuda

from trt.cuda.context import NON_BLOCKING, CudaDevice
from trt.cuda.kernels import RowCopier
from trt.cuda.memory import device_memory, pinned_memory
from trt.slab.layout import SlotLayout
from trt.slab.staging import STAGING_ROWS, StagedSlab


class CudaSlab(StagedSlab[cuda.Event]):
    """Slots in device memory. The bytes of empty slots are zero."""

    def __init__(
        self, device: CudaDevice, copier: RowCopier, layout: SlotLayout, num_slots: int, num_rows: int = STAGING_ROWS
    ) -> None:
        """Raises `EngineUnavailable` if the slots or the staging rows do not fit in memory."""
        super().__init__(layout, num_slots, num_rows)
        self._device = device
        self._copier = copier
        remedy = f"no memory for {num_slots} slots and {self.num_rows} staging rows: ask for fewer"
        with device.current():
            self._stream = cuda.Stream(NON_BLOCKING)
            self._tokens = device_memory(num_slots * layout.token_bytes, remedy)
            self._scales = device_memory(num_slots * layout.scale_bytes, remedy)
            self._row_addresses = (0, 0, 0)
            if self.num_rows > 0:
                tokens = pinned_memory((self.num_rows, layout.token_bytes), np.uint8, remedy)
                scales = pinned_memory((self.num_rows, layout.scale_bytes), np.uint8, remedy)
                slots = pinned_memory((self.num_rows,), np.int32, remedy)
                self.row_tokens, self.row_scales, self.row_slots = tokens.array, scales.array, slots.array
                self._row_addresses = (tokens.address, scales.address, slots.address)

    def wait_for_published(self, stream: cuda.Stream) -> None:
        """Make the stream wait, on the device, for the last publication."""
        if self.published is not None:
            stream.wait_for_event(self.published)

    def gather(self, slots: int, num_pairs: int, tokens: int, scales: int, stream: cuda.Stream) -> None:
        """Enqueue the copy of slots to `tokens` and `scales`, in the order of `slots`; all of these are addresses.

        At `slots` are `num_pairs` int32. A storage type without scales does not write to `scales`.
        """
        for source, target, row_bytes in (
            (self._tokens, tokens, self.layout.token_bytes),
            (self._scales, scales, self.layout.scale_bytes),
        ):
            if row_bytes > 0:
                self._copier.copy(
                    int(source), target, num_rows=num_pairs, row_bytes=row_bytes, source_rows=slots, stream=stream
                )

    def _current(self) -> AbstractContextManager[None]:
        return self._device.current()

    def _copy_rows(self, rows: range) -> None:
        # The kernel reads the pinned rows directly: no second copy, and only published rows are transferred.
        tokens, scales, slots = self._row_addresses
        for source, target, row_bytes in (
            (tokens, self._tokens, self.layout.token_bytes),
            (scales, self._scales, self.layout.scale_bytes),
        ):
            if row_bytes > 0:
                self._copier.copy(
                    source + rows.start * row_bytes,
                    int(target),
                    num_rows=len(rows),
                    row_bytes=row_bytes,
                    target_rows=slots + rows.start * self.row_slots.itemsize,
                    stream=self._stream,
                )

    def _record_event(self) -> cuda.Event:
        event = cuda.Event(cuda.event_flags.DISABLE_TIMING)
        event.record(self._stream)
        return event

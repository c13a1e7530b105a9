"""The token slab in device memory: filled from pinned rows on a stream of its own, gathered on the one that computes.

Neither waits for the other on the host: a gather waits on the device for what was published before it.
Knows bytes only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycuda.driver as cuda
from numpy.typing import NDArray

from trt.cuda.context import NON_BLOCKING, CudaDevice
from trt.cuda.kernels import RowCopier
from trt.cuda.memory import device_memory, pinned_memory
from trt.slab.layout import SlotLayout
from trt.slab.staging import StagingRing, runs

#: 100 MB of pinned memory at 24.6 kB an image: a request of 1,000 candidates on each of four fetching threads.
STAGING_ROWS = 4096


class CudaSlab:
    """Empty slots are all zero. `stage` and `publish` run on one thread, `gather` on another."""

    def __init__(
        self, device: CudaDevice, copier: RowCopier, layout: SlotLayout, num_slots: int, num_rows: int = STAGING_ROWS
    ) -> None:
        """`num_rows` staging rows at most, and no more than slots: of an engine without slots nothing is staged.

        Raises `EngineUnavailable` if the slots or the rows do not fit.
        """
        self.layout = layout
        self.num_slots = num_slots
        self._device = device
        self._copier = copier
        num_rows = min(num_rows, num_slots)
        self._ring = StagingRing[cuda.Event](num_rows)
        self._published: cuda.Event | None = None
        remedy = f"no memory for {num_slots} slots and {num_rows} staging rows: ask for fewer"
        with device.current():
            self._stream = cuda.Stream(NON_BLOCKING)
            self._tokens = device_memory(num_slots * layout.token_bytes, remedy)
            self._scales = device_memory(num_slots * layout.scale_bytes, remedy)
            self._row_tokens = pinned_memory((num_rows, layout.token_bytes), np.uint8, remedy)
            self._row_scales = pinned_memory((num_rows, layout.scale_bytes), np.uint8, remedy)
            self._row_slots = pinned_memory((num_rows,), np.int32, remedy)

    def stage(self, slots: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[int]]:
        """Rows of pinned memory; waits only where a copy of what they held before is not over."""
        rows, marks = self._ring.take(len(slots))
        with self._device.current():
            for mark in marks:
                mark.synchronize()
        return self._row_tokens.array, self._row_scales.array, rows

    def publish(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Have the device fetch these rows, and return at once."""
        if not slots:
            return
        self._row_slots.array[list(rows)] = slots
        with self._device.current():
            stretches = runs(rows)
            for stretch in stretches:
                self._fetch(stretch)
            published = cuda.Event(cuda.event_flags.DISABLE_TIMING)
            published.record(self._stream)
            for stretch in stretches:
                self._ring.hold(stretch, published)
            self._published = published

    def wait_for_published(self, stream: cuda.Stream) -> None:
        """Have the stream wait, on the device, for everything that is published by now."""
        if self._published is not None:
            stream.wait_for_event(self._published)

    def gather(self, slots: int, num_pairs: int, tokens: int, scales: int, stream: cuda.Stream) -> None:
        """Enqueue the copy of the slots' content to `tokens` and `scales`, side by side; all of them addresses.

        `slots` holds `num_pairs` int32. Without scales in the storage type, `scales` is not written.
        """
        for source, target, row_bytes in (
            (self._tokens, tokens, self.layout.token_bytes),
            (self._scales, scales, self.layout.scale_bytes),
        ):
            if row_bytes > 0:
                self._copier.copy(
                    int(source), target, num_rows=num_pairs, row_bytes=row_bytes, source_rows=slots, stream=stream
                )

    def _fetch(self, rows: range) -> None:
        # The kernel reads pinned rows over the bus by itself: nothing is copied twice, and of what was staged only
        # what is wanted travels.
        for source, target, row_bytes in (
            (self._row_tokens, self._tokens, self.layout.token_bytes),
            (self._row_scales, self._scales, self.layout.scale_bytes),
        ):
            if row_bytes > 0:
                self._copier.copy(
                    source.address + rows.start * row_bytes,
                    int(target),
                    num_rows=len(rows),
                    row_bytes=row_bytes,
                    target_rows=self._row_slots.address + rows.start * self._row_slots.array.itemsize,
                    stream=self._stream,
                )

"""The token slab in host memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trt.contract import EngineUnavailable
from trt.slab.layout import SlotLayout


class HostSlab:
    """Slots in ordinary memory, into which blobs are decoded directly. The bytes of empty slots are zero."""

    def __init__(self, layout: SlotLayout, num_slots: int) -> None:
        """Raises `EngineUnavailable` if the slots do not fit in memory."""
        self.layout = layout
        self.num_slots = num_slots
        #: Number of publications of each slot; rows derived from older content are computed again.
        self.versions: NDArray[np.uint32] = np.zeros(num_slots, np.uint32)
        try:
            # The system allocates zeroed pages at the first write: an empty slab uses no memory.
            self.tokens: NDArray[np.uint8] = np.zeros((num_slots, layout.token_bytes), np.uint8)
            self.scales: NDArray[np.uint8] = np.zeros((num_slots, layout.scale_bytes), np.uint8)
        except MemoryError as error:
            gigabytes = num_slots * (layout.token_bytes + layout.scale_bytes) / 1e9
            raise EngineUnavailable(f"no memory for {num_slots} slots ({gigabytes:.1f} GB): ask for fewer") from error

    def stage(self, slots: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[int]]:
        return self.tokens, self.scales, slots

    def publish(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Mark the slots as changed; their content was written in place."""
        self.versions[list(slots)] += 1

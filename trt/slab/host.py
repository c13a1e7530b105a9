"""Slabs that a torch engine gathers from: host memory shared with numpy, and device memory behind a staging ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trt.contract import EngineUnavailable, LimitExceeded, TokenSlab
from trt.slab.layout import HostSlab, SlotLayout

#: 100 MB of pinned memory at 24.6 kB an image: a request of 1,000 candidates on each of four fetching threads.
DEFAULT_STAGING_ROWS = 4096


class GatherSlab(TokenSlab, Protocol):
    """A slab whose slots can be collected on the device that computes."""

    layout: SlotLayout
    num_slots: int

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:  # (B,) -> uint8 (B, token bytes), (B, scale bytes)
        ...


class SharedSlab(HostSlab):
    """Host memory under both a numpy and a torch name: for an engine on the CPU."""

    def __init__(self, layout: SlotLayout, num_slots: int) -> None:
        super().__init__(layout, num_slots)
        self._tokens = torch.from_numpy(self.tokens)
        self._scales = torch.from_numpy(self.scales)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self._tokens.index_select(0, slots), self._scales.index_select(0, slots)


class StagedSlab:
    """Device memory, filled through a ring of pinned rows.

    The rows of one `stage` stay the caller's until `num_rows` more have been staged; rows that are never published
    cost nothing. `publish` returns when the copy is done.
    """

    def __init__(self, layout: SlotLayout, num_slots: int, device: torch.device, num_rows: int) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self._device = device
        self._tokens = torch.zeros((num_slots, layout.token_bytes), dtype=torch.uint8, device=device)
        self._scales = torch.zeros((num_slots, layout.scale_bytes), dtype=torch.uint8, device=device)
        pinned = device.type == "cuda"
        self._row_tokens = torch.zeros((num_rows, layout.token_bytes), dtype=torch.uint8, pin_memory=pinned)
        self._row_scales = torch.zeros((num_rows, layout.scale_bytes), dtype=torch.uint8, pin_memory=pinned)
        self._num_rows = num_rows
        self._next_row = 0

    def stage(self, slots: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[int]]:
        if len(slots) > self._num_rows:
            raise LimitExceeded(f"{len(slots)} slots staged in one call; this engine takes {self._num_rows}")
        if self._next_row + len(slots) > self._num_rows:
            self._next_row = 0
        rows = range(self._next_row, self._next_row + len(slots))
        self._next_row = rows.stop
        return self._row_tokens.numpy(), self._row_scales.numpy(), rows

    def publish(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        if not slots:
            return
        # One copy of the span, from pinned memory, then a scatter on the device: rows that are not wanted travel too,
        # but they are few (broken blobs), and a gather on the host would copy everything once more.
        first, last = min(rows), max(rows)
        picked = torch.tensor([row - first for row in rows], device=self._device)
        targets = torch.tensor(slots, device=self._device)
        for source, slab in ((self._row_tokens, self._tokens), (self._row_scales, self._scales)):
            span = source[first : last + 1].to(self._device, non_blocking=True)
            slab.index_copy_(0, targets, span.index_select(0, picked))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self._tokens.index_select(0, slots), self._scales.index_select(0, slots)


def build_slab(layout: SlotLayout, num_slots: int, device: torch.device) -> GatherSlab:
    """The slab for a device. Raises `EngineUnavailable` if it does not fit there."""
    if device.type == "cpu":
        return SharedSlab(layout, num_slots)
    try:
        return StagedSlab(layout, num_slots, device, DEFAULT_STAGING_ROWS)
    except torch.OutOfMemoryError as error:
        raise EngineUnavailable(f"no memory for {num_slots} slots on {device}: ask for fewer") from error

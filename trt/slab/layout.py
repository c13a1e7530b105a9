"""How stored tokens lie in the slots of a slab, and the slab of host memory.

Knows bytes only; what they mean is in `trt.runtimes.dequantize`, how images come to slots in `workers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from protocols.quantize import StorageType, num_scale_bytes, num_token_bytes
from trt.contract import EngineUnavailable

STORAGES = get_args(StorageType)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The bytes of one image: `num_tokens` x `token_dim` values as `storage`, and the scales that go with them."""

    storage: str
    num_tokens: int
    token_dim: int

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise EngineUnavailable(f"unknown storage {self.storage!r}: choose one of {', '.join(STORAGES)}")
        try:
            num_token_bytes(self.storage, self.num_tokens, self.token_dim)
        except ValueError as error:
            raise EngineUnavailable(str(error)) from error

    @property
    def token_bytes(self) -> int:
        return num_token_bytes(self.storage, self.num_tokens, self.token_dim)

    @property
    def scale_bytes(self) -> int:
        return num_scale_bytes(self.storage, self.num_tokens, self.token_dim)


class HostSlab:
    """A slab in ordinary memory: blobs are decoded straight into their slots. Empty slots are all zero."""

    def __init__(self, layout: SlotLayout, num_slots: int) -> None:
        self.layout = layout
        self.num_slots = num_slots
        try:
            # Zeroed pages cost nothing until they are written, so a large slab is not paid for in advance.
            self.tokens: NDArray[np.uint8] = np.zeros((num_slots, layout.token_bytes), np.uint8)
            self.scales: NDArray[np.uint8] = np.zeros((num_slots, layout.scale_bytes), np.uint8)
        except MemoryError as error:
            gigabytes = num_slots * (layout.token_bytes + layout.scale_bytes) / 1e9
            raise EngineUnavailable(f"no memory for {num_slots} slots ({gigabytes:.1f} GB): ask for fewer") from error

    def stage(self, slots: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[int]]:
        return self.tokens, self.scales, slots

    def publish(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Nothing is left to do: what was written into a slot is its content."""

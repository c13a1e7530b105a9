"""How stored tokens lie in the slots of a slab, and the slab of host memory.

Knows bytes only; what they mean is in `trt.runtimes.dequantize`, how images come to slots in `workers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt.contract import EngineUnavailable

#: Neighbouring values that share a scale in int4.
INT4_GROUP = 32
STORAGES = ("fp16", "bf16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The bytes of one image: `num_tokens` x `token_dim` values as `storage`, and the scales that go with them."""

    storage: str
    num_tokens: int
    token_dim: int

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise EngineUnavailable(f"unknown storage {self.storage!r}: choose one of {', '.join(STORAGES)}")
        if self.storage == "int4" and self.token_dim % INT4_GROUP:
            raise EngineUnavailable(f"int4 needs tokens of a multiple of {INT4_GROUP} values, not {self.token_dim}")

    @property
    def token_bytes(self) -> int:
        num_values = self.num_tokens * self.token_dim
        return {"fp16": 2 * num_values, "bf16": 2 * num_values, "int8": num_values, "int4": num_values // 2}[
            self.storage
        ]

    @property
    def scale_bytes(self) -> int:
        """int8: one float32 per token. int4: one float16 per group. The others need none."""
        num_groups = self.num_tokens * self.token_dim // INT4_GROUP
        return {"int8": 4 * self.num_tokens, "int4": 2 * num_groups}.get(self.storage, 0)


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

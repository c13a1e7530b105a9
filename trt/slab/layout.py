"""The size of one slot of a token slab in bytes. Knows no memory; `workers` assigns images to slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from protocols.quantize import StorageType, num_scale_bytes, num_token_bytes
from trt.contract import EngineUnavailable

STORAGES = get_args(StorageType)


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """`num_tokens` x `token_dim` values stored as `storage`, and their scales."""

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

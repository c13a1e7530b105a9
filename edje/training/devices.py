"""Where a run computes: one device, or one of several that `torchrun` started. Plain torch.distributed.

Not Hugging Face accelerate: a step draws its samples from seed and step alone and every device plans the same global
batch, so there is nothing to gather but gradients, which DDP does; what accelerate would add (its own loader, its own
checkpoint format with pickles) would have to be worked around to resume bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Devices:
    """This process's device, its rank, and how many there are."""

    device: torch.device
    rank: int = 0
    num_devices: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over all devices."""
        if self.num_devices == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)

    def wait(self) -> None:
        """Until every process is here."""
        if self.num_devices > 1:
            distributed.barrier()


@contextmanager
def devices(name: str | None) -> Iterator[Devices]:
    """The device of this name (None: CUDA where there is one), joined with the other processes of a `torchrun`."""
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if name is None:
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if num_devices == 1:
        yield Devices(device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Devices(device, rank, num_devices)
    finally:
        distributed.destroy_process_group()


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is multiplied in hardware there; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))

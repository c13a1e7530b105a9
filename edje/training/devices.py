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


class DeviceError(ValueError):
    """There is no such device; the message says which there are."""


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

    def any(self, is_true: bool) -> bool:
        """Whether it is true of any device; all of them must ask, and all get the same answer."""
        if self.num_devices == 1:
            return is_true
        flag = torch.tensor(float(is_true), device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)


@contextmanager
def devices(name: str | None) -> Iterator[Devices]:
    """The device of this name (None: CUDA where there is one), joined with the other processes of a `torchrun`.

    Raises `DeviceError`.
    """
    # Not settings of ours: this is how torchrun tells a process of the others.
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(name or ("cuda" if torch.cuda.is_available() else "cpu"), local_rank)
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
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _device(name: str, local_rank: int) -> torch.device:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError("neither a CPU nor a CUDA device")
        if device.type == "cuda":
            # Each process of one machine has its own; without a number, "cuda" would be the first one for all.
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    # What torch says of a device that is not there: an assertion without CUDA, else a RuntimeError.
    except (RuntimeError, AssertionError, ValueError) as error:
        found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise DeviceError(f"the device {name!r} cannot be used here: choose one of {', '.join(found)}") from error
    return device

"""The device of this process, and the other processes that `torchrun` started. Plain torch.distributed.

Hugging Face accelerate is not used: each device plans the same global batch from seed and batch number, so only
gradients have to be exchanged, which DDP does. Its own data loader and its pickled checkpoints would prevent an exact
continuation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

#: Timeout for one exchange of gradients or embeddings within a step.
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
#: Timeout for messages between steps; when a process dies, torchrun ends the other processes.
_CONTROL_TIMEOUT = timedelta(days=7)


class DeviceError(ValueError):
    """The device is unavailable; the message names the available ones."""


@dataclass(frozen=True, slots=True)
class Devices:
    """This process's device and rank, and the number of devices.

    `control` is a group on the CPU, for messages between the processes that neither wait for a GPU nor time out: one
    process may validate or extract features for hours while the others wait.
    """

    device: torch.device
    rank: int = 0
    num_devices: int = 1
    control: distributed.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes the files of the run and shows its progress."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over all devices."""
        if self.num_devices == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)

    def wait(self) -> None:
        """Block until every process has called this."""
        self.any(False)

    def any(self, is_true: bool) -> bool:
        """Whether `is_true` on any device. Every process must call this, and all get the same answer."""
        if self.num_devices == 1:
            return is_true
        flag = torch.tensor(float(is_true))
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.control)
        return bool(flag)


@contextmanager
def devices(name: str | None) -> Iterator[Devices]:
    """The device of this name, connected with the other processes of a `torchrun`. None: CUDA if available, else CPU.

    Raises `DeviceError`.
    """
    # These variables are torchrun's interface to its processes, not settings.
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = _device(name or ("cuda" if torch.cuda.is_available() else "cpu"), local_rank)
    if num_devices == 1:
        yield Devices(device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_COLLECTIVE_TIMEOUT)
    try:
        control = cast(distributed.ProcessGroup, distributed.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT))
        yield Devices(device, rank, num_devices, control)
    finally:
        distributed.destroy_process_group()


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere bf16 is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def all_gather(rows: Tensor) -> Tensor:
    """The rows of all devices in order of rank: (B, ...) -> (G, ...), with B equal on all devices.

    Gradients flow back to the device of each row. Every device must call this in the same order.
    """
    if not distributed.is_initialized():
        return rows
    return cast(Tensor, _AllGather.apply(rows))


def all_gather_texts(states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The texts of all devices: (B, T, d) and (B,) -> (G, T', d) and (G,), padded to the longest text."""
    if not distributed.is_initialized():
        return states, lengths
    all_lengths = all_gather(lengths)
    num_missing = int(all_lengths.max()) - states.shape[1]
    padded = torch.nn.functional.pad(states, (0, 0, 0, num_missing))  # truncated where every text is shorter
    return all_gather(padded), all_lengths


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        distributed.all_reduce(gradient)  # the sum over all devices' losses
        first = distributed.get_rank() * ctx.num_rows
        return gradient[first : first + ctx.num_rows]


def _device(name: str, local_rank: int) -> torch.device:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError("neither a CPU nor a CUDA device")
        if device.type == "cuda":
            # Without an index, "cuda" would be the first device for every process of a machine.
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    # Without CUDA torch raises an AssertionError, otherwise a RuntimeError.
    except (RuntimeError, AssertionError, ValueError) as error:
        found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise DeviceError(f"the device {name!r} is unavailable: choose one of {', '.join(found)}") from error
    return device

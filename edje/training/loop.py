"""The loop over the steps of a phase. Knows when to stop, to save and to speak; what is computed is the step's.

Everything random in a step follows from the seed, the phase and the step's number, so a run that is resumed on one
device goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from edje.recipe import Phase
from edje.training.devices import Devices, computes_bf16
from edje.training.schedule import learning_rate
from edje.training.step import Batch, TrainingStep, total

#: Losses and rates are written down every so many steps.
SPEAK_EVERY = 20


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to change."""


def train_phase(
    module: TrainingStep,
    optimizer: torch.optim.Optimizer,
    phase: Phase,
    phase_number: int,
    *,
    seed: int,
    steps: Iterable[int],
    num_steps: int,
    steps_per_epoch: int,
    batch_of: Callable[[int, np.random.Generator], Batch],
    devices: Devices,
    on_step: Callable[[int, dict[str, float] | None], None],
) -> None:
    """Take these optimizer steps; `batch_of` gets the number of a micro-batch (`accumulate` of them to a step).

    `on_step` hears of every step that is done, with values to write down now and then. Raises `TrainingStopped`.
    """
    wrapped = devices.wrap(module)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    in_bf16 = phase.precision == "bf16" and computes_bf16(devices.device)
    module.train()
    for step in steps:
        rate = learning_rate(phase, step, steps_per_epoch, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.zero_grad(set_to_none=True)
        told: dict[str, Tensor] = {}
        for part in range(phase.accumulate):
            number = step * phase.accumulate + part
            # The plan is the same on every device, what is hidden from a model is not.
            batch = batch_of(number, np.random.default_rng([seed, phase_number, number]))
            torch.manual_seed(_mixed(seed, phase_number, number, devices.rank))
            is_last = part == phase.accumulate - 1
            with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not is_last else nullcontext():
                with torch.autocast(devices.device.type, torch.bfloat16, enabled=in_bf16):
                    losses: dict[str, Tensor] = wrapped(batch)
                loss = total(losses, phase) / phase.accumulate
                if not loss.requires_grad:
                    raise TrainingStopped(
                        f"phase {phase.name!r} trains {', '.join(phase.train)}, on which none of its losses "
                        f"({', '.join(phase.losses)}) depends: name other parts or other losses"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                told[name] = told.get(name, torch.zeros_like(value)) + value.detach() / phase.accumulate
        norm = nn.utils.clip_grad_norm_(trained, phase.clip_norm)
        values = {name: float(value) for name, value in told.items()} | {"gradient_norm": float(norm)}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise TrainingStopped(
                f"step {step} of phase {phase.name!r}: {' and '.join(broken)} not finite ({values[broken[0]]}); the "
                f"weights were not changed by it. Lower the learning rate ({rate:.1e} now) or clip_norm, and start "
                "again from the last saved state"
            )
        optimizer.step()
        module.clamp_scales()
        speaks = step % SPEAK_EVERY == 0 or step == num_steps - 1
        on_step(step, values | {"learning_rate": rate} if speaks else None)


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, well apart for neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

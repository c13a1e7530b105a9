"""The loop over the optimizer steps of a phase.

Everything random in a step follows from the seed, the phase and the step's number, so a run that is resumed on one
device continues bit for bit.
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
from edje.training.batches.batch import Batch
from edje.training.devices import Devices, computes_bf16
from edje.training.schedule import learning_rate
from edje.training.step import TrainingStep, total

#: Steps between two lines of metrics.
LOG_EVERY = 20


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message says at which step, why, and what to change."""


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
    """Take these optimizer steps. `batch_of` builds a batch by number; a step has `accumulate` batches.

    `on_step` is called after every step, every `LOG_EVERY` steps with metrics. Raises `TrainingStopped`.
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
        sums: dict[str, Tensor] = {}
        for part in range(phase.accumulate):
            number = step * phase.accumulate + part
            # The plan is the same on every device; masked words and dropped patches differ.
            batch = batch_of(number, np.random.default_rng([seed, phase_number, number]))
            torch.manual_seed(_combined_seed(seed, phase_number, number, devices.rank))
            is_last = part == phase.accumulate - 1
            with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not is_last else nullcontext():
                with torch.autocast(devices.device.type, torch.bfloat16, enabled=in_bf16):
                    losses: dict[str, Tensor] = wrapped(batch)
                loss = total(losses, phase) / phase.accumulate
                if not loss.requires_grad:
                    raise TrainingStopped(
                        f"phase {phase.name!r} trains {', '.join(phase.train)}, but its losses "
                        f"({', '.join(phase.losses)}) do not depend on these parts: change `train` or `losses`"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / phase.accumulate
        norm = nn.utils.clip_grad_norm_(trained, phase.clip_norm)
        values = {name: float(value) for name, value in sums.items()} | {"gradient_norm": float(norm)}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise TrainingStopped(
                f"step {step} of phase {phase.name!r}: {' and '.join(broken)} not finite ({values[broken[0]]}); the "
                f"step did not change the weights. Lower the learning rate ({rate:.1e} now) or clip_norm, and start "
                "again from the last saved state"
            )
        optimizer.step()
        module.clamp_scales()
        is_logged = step % LOG_EVERY == 0 or step == num_steps - 1
        on_step(step, values | {"learning_rate": rate} if is_logged else None)


def _combined_seed(*numbers: int) -> int:
    """One seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

"""The optimizer steps of a phase.

Everything random in a step follows from the seed, the phase and the step's number, so a run that is resumed on one
device continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

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


class StepDone:
    """One finished step. Its losses are read without waiting for what the device computes afterwards."""

    def __init__(
        self,
        number: int,
        phase: str,
        learning_rate: float,
        values: Mapping[str, Tensor],
        timings: Mapping[str, float] | None,
    ) -> None:
        """`values` are the losses and the norm of the gradient; `timings` are None for a step that is not logged."""
        self.number = number
        self.is_logged = timings is not None
        self._phase = phase
        self._learning_rate = learning_rate
        self._names = tuple(values)
        self._timings = timings or {}
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._copied: torch.cuda.Event | None = None
        if stacked.is_cuda:
            self._values = torch.empty(stacked.shape, pin_memory=True).copy_(stacked, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._values = stacked

    def check(self) -> None:
        """Wait for the step. Raises `TrainingStopped` if a loss or the gradient is not finite."""
        values = self._read()
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise TrainingStopped(
                f"step {self.number} of phase {self._phase!r}: {' and '.join(broken)} not finite "
                f"({values[broken[0]]}). The saved states are from before this step. Lower the learning rate "
                f"({self._learning_rate:.1e} now) or clip_norm, and start again from the last saved state"
            )

    def metrics(self) -> dict[str, float]:
        """Losses, gradient norm, learning rate and timings, for one line of metrics."""
        return self._read() | {"learning_rate": self._learning_rate} | dict(self._timings)

    def _read(self) -> dict[str, float]:
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


def train_steps(
    module: TrainingStep,
    optimizer: torch.optim.Optimizer,
    phase: Phase,
    phase_number: int,
    *,
    seed: int,
    steps: Iterable[int],
    num_steps: int,
    steps_per_epoch: int,
    accumulate: int,
    batch_of: Callable[[int, np.random.Generator], Batch],
    devices: Devices,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[StepDone]:
    """Take these optimizer steps and yield each when it is done, every `LOG_EVERY` steps with timings.

    `batch_of` builds a batch by number; a step has `accumulate` batches. Raises `TrainingStopped` for a step with a
    loss that is not finite: before it changes the weights, or on a GPU, which is not waited for, one step later.
    """
    wrapped = devices.wrap(module)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    in_bf16 = phase.precision == "bf16" and computes_bf16(devices.device)
    is_asynchronous = devices.device.type == "cuda"
    before: StepDone | None = None
    window = _Window(clock)
    module.train()
    for step in steps:
        rate = learning_rate(phase, step, steps_per_epoch, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for part in range(accumulate):
            number = step * accumulate + part
            # The plan is the same on every device; masked words and dropped patches differ.
            with window.waiting():
                batch = batch_of(number, np.random.default_rng([seed, phase_number, number]))
            torch.manual_seed(_combined_seed(seed, phase_number, number, devices.rank))
            is_last = part == accumulate - 1
            with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not is_last else nullcontext():
                with torch.autocast(devices.device.type, torch.bfloat16, enabled=in_bf16):
                    losses: dict[str, Tensor] = wrapped(batch)
                loss = total(losses, phase) / accumulate
                if not loss.requires_grad:
                    raise TrainingStopped(
                        f"phase {phase.name!r} trains {', '.join(phase.train)}, but its losses "
                        f"({', '.join(phase.losses)}) do not depend on these parts: change `train` or `losses`"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() / accumulate
        norm = nn.utils.clip_grad_norm_(trained, phase.clip_norm)
        window.add(accumulate * phase.batch_size * devices.num_devices)
        is_logged = step % LOG_EVERY == 0 or step == num_steps - 1
        timings = window.close() if is_logged else None
        done = StepDone(step, phase.name, rate, sums | {"gradient_norm": norm}, timings)
        checked = before if is_asynchronous else done
        if checked is not None:
            checked.check()
        optimizer.step()
        module.clamp_scales()
        before = done
        yield done


class _Window:
    """Times the steps between two lines of metrics."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self._waited = 0.0
        self._num_samples = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def add(self, num_samples: int) -> None:
        """Count the captions of a step, on all devices."""
        self._num_samples += num_samples

    def close(self) -> dict[str, float]:
        """The timings since the last call."""
        now = self._clock()
        elapsed = max(now - self._start, 1e-9)
        timings = {"samples_per_second": self._num_samples / elapsed, "data_wait_share": self._waited / elapsed}
        self._start, self._waited, self._num_samples = now, 0.0, 0
        return timings


def _combined_seed(*numbers: int) -> int:
    """One seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

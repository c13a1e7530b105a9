"""Steps, devices and signals, without a model."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

from edje.recipe import Phase
from edje.training.devices import DeviceError, Devices, devices
from edje.training.interrupt import sigterm_as_interrupt, stop_requests
from edje.training.loop import LOG_EVERY, TrainingStopped, train_steps


class OneWeight(nn.Module):
    """Stands for a training module: its loss is what the batch says of its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, batch):
        return {"itm": batch(self.weight)}

    def clamp_scales(self):
        pass


def steps_of(losses, clock=lambda: 0.0, **values):
    """Take a step for each `accumulate` of these losses: the module, and the metrics of the logged steps."""
    phase = phase_with(**values)
    module = OneWeight()
    steps = train_steps(
        module,
        torch.optim.SGD([{"params": [module.weight], "factor": 0.5}], lr=1.0),
        phase,
        0,
        seed=0,
        steps=range(len(losses) // phase.accumulate),
        num_steps=len(losses),
        steps_per_epoch=10,
        accumulate=phase.accumulate,
        batch_of=lambda number, rng: losses[number],
        devices=Devices(torch.device("cpu")),
        clock=clock,
    )
    return module, [done.metrics() for done in steps if done.is_logged]


def phase_with(**values):
    fixed = {"name": "rank", "epochs": 1.0, "batch_size": 8, "learning_rate": 1.0, "warmup_steps": 0}
    parts = {"train": {"adapter": 1.0, "text": 1.0}, "losses": {"itm": 1.0}, "precision": "fp32"}
    return Phase(**(fixed | parts | values))


def test_gradients_are_clipped_and_their_norm_before_clipping_is_logged():
    module, logged = steps_of([lambda weight: (weight * torch.tensor([30.0, 40.0])).sum()], clip_norm=0.5)

    assert module.weight.grad.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert logged[0]["gradient_norm"] == pytest.approx(50.0)
    # The part learns at half the rate.
    torch.testing.assert_close(module.weight.detach(), torch.tensor([3.0 - 0.15, 4.0 - 0.2]), rtol=1e-4, atol=0)


def test_accumulated_batches_add_up_to_their_mean():
    module, logged = steps_of(
        [lambda weight: 2 * weight.sum(), lambda weight: 4 * weight.sum()], accumulate=2, clip_norm=1e9
    )

    assert module.weight.grad.tolist() == [3.0, 3.0]
    assert logged[0]["itm"] == pytest.approx(7 * 3.0)


def test_speed_and_the_share_of_time_spent_waiting_for_data_are_logged_over_the_steps_since_the_last_line():
    times = iter(range(10_000))

    _, logged = steps_of([lambda weight: weight.sum()] * (LOG_EVERY + 1), clock=lambda: float(next(times)))

    # Each step reads the clock twice, a second apart, around its batch; a logged step once more.
    assert logged[0]["samples_per_second"] == pytest.approx(8 / 3)
    assert logged[0]["data_wait_share"] == pytest.approx(1 / 3)
    assert logged[1]["samples_per_second"] == pytest.approx(8 * LOG_EVERY / (2 * LOG_EVERY + 1))
    assert logged[1]["data_wait_share"] == pytest.approx(LOG_EVERY / (2 * LOG_EVERY + 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_changes_anything(value, monkeypatch):
    seen = []
    monkeypatch.setattr(OneWeight, "clamp_scales", lambda self: seen.append(self.weight.tolist()))

    with pytest.raises(
        TrainingStopped, match=r"step 1 of phase 'rank': itm and gradient_norm not finite .* from before this step"
    ):
        steps_of([lambda weight: weight.sum(), lambda weight: (weight * value).sum()])

    assert len(seen) == 1


def test_a_loss_that_no_trained_part_affects_is_refused():
    with pytest.raises(
        TrainingStopped, match=r"trains adapter, text, but its losses \(itm\) do not depend on these parts"
    ):
        steps_of([lambda weight: torch.tensor(1.0)])


def test_an_unavailable_device_is_reported_in_a_sentence():
    for name in ("abacus", "meta", "cuda:99"):
        with pytest.raises(DeviceError, match=f"'{name}' is unavailable: choose one of cpu"), devices(name):
            pass


def test_the_second_signal_stops_at_once():
    with stop_requests() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_outside_training_sigterm_interrupts_at_once_and_the_former_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)

    with sigterm_as_interrupt(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) is before

"""Compares engines on the same pairs: computes the reference's logits and reports how well another engine agrees."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from edje.model.weights import Checkpoint
from trt.check.pairs import ParityPairs, logits_of
from trt.contract import Engine
from trt.manifest import ParityReport
from trt.parity import Thresholds, compare
from trt.runtimes.torch_device import TorchDevice
from trt.runtimes.torch_engine import TorchEngine
from trt.slab.layout import SlotLayout
from trt.slab.torch_slab import SharedSlab

_MAX_PAIRS, _MAX_IMAGES = 256, 4


def torch_reference(checkpoint: Checkpoint, storage: str, num_slots: int) -> TorchEngine:
    """Return the reference engine: torch in float32 on the CPU, equal on all machines except for rounding."""
    config = checkpoint.config
    layout = SlotLayout(storage, config.adapter.num_tokens, config.joint.dim)
    return TorchEngine(
        checkpoint,
        slab=SharedSlab(layout, num_slots),
        max_pairs=_MAX_PAIRS,
        max_images=_MAX_IMAGES,
        device=TorchDevice(torch.device("cpu")),
        dtype=torch.float32,
    )


def scored(engine: Engine, pairs: ParityPairs, bars: Progress) -> NDArray[np.float32]:
    """Return the logits of all pairs, (Q, N), and show a progress bar."""
    bar = bars.add_task(f"pairs in {engine.info.runtime}", total=len(pairs.texts) * len(pairs.pixels))
    return logits_of(engine, pairs, lambda done: bars.advance(bar, done))


def report_on(
    engine: Engine, reference: NDArray[np.float32], pairs: ParityPairs, thresholds: Thresholds, bars: Progress
) -> ParityReport:
    """Score the pairs and compare them with the reference; the thresholds are recorded, not checked.

    Raises `ParityFailed` for logits that are not finite.
    """
    agreement = compare(reference, scored(engine, pairs, bars))
    return ParityReport(runtime=engine.info.runtime, pairs_of=pairs.summary, thresholds=thresholds, agreement=agreement)

"""A tiny recipe that trains in a second, and functions that run it.

As a program, one process of a run on several devices: `python training_harness.py RECIPE OUT`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor

from edje.recipe import Recipe
from edje.recipe_file import read_recipe
from edje.training.batches.batch import BatchBuilder
from edje.training.devices import Devices, devices
from edje.training.run import Run, RunFolders, start_run

TINY = """
name = "tiny"
image_size = 16
max_caption_pieces = 30
k = 4
dev_captions = 10

[data]
kind = "scenes"
train_groups = 5
dev_groups = 1

[vision]
patch_size = 8
dim = 16
num_layers = 1
num_heads = 2
hidden_dim = 16
stem = "conv"

[adapter]
kind = "local"
num_tokens = 4
hidden_dim = 16

[joint]
kind = "full"
dim = 16
num_heads = 2
hidden_dim = 32
num_layers = 2
reads_first_stage = true

[first_stage]
kind = "dual"
dim = 8
text_dim = 16
num_heads = 2

[[phase]]
name = "see"
epochs = 0.6
batch_size = 16
learning_rate = 3e-3
warmup_steps = 2
precision = "fp32"
train = {vision = 1, adapter = 1, text = 1, meeting = 1, first_stage = 1}
losses = {mlm = 1, first_stage = 1}

[[phase]]
name = "rank"
epochs = 0.5
batch_size = 8
learning_rate = 3e-3
warmup_steps = 2
decay = "cosine"
precision = "fp32"
train = {adapter = 1, text = 0.5, meeting = 1}
losses = {itm = 1, mlm = 0.5, text_recovery = 0.5}
negatives = {per_sample = 2}
word_dropout = 0.1
token_dropout = 0.1
"""
#: Optimizer steps of the two phases: 100 captions in batches of 16 and of 8.
SEE_STEPS, RANK_STEPS = 4, 6


def tiny_recipe(folder: Path, *changes: str, text: str = TINY) -> Recipe:
    """The recipe, written to this folder and read with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.toml"
    path.write_text(text)
    return read_recipe(path, changes)


class RecordedConsole:
    """A console that keeps its output as text."""

    def __init__(self) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, width=400)

    @property
    def text(self) -> str:
        return self._file.getvalue()


def train(recipe: Recipe, out: Path, *, save_every: int = 500, output: RecordedConsole | None = None) -> Path:
    """Run a recipe in this process. Returns the checkpoint."""
    return start_run(
        recipe, folders_in(out), Devices(torch.device("cpu")), (output or RecordedConsole()).console, save_every
    )


def folders_in(out: Path) -> RunFolders:
    return RunFolders(out, out.parent / "features")


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def content(checkpoint: Path) -> dict[str, bytes]:
    """The content of every file of a checkpoint."""
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}


def last_step(recipe: Recipe, out: Path, on: Devices) -> dict[str, Tensor]:
    """Run a recipe. Returns the gradients of its last step and the final weights by name."""
    run = Run(recipe, folders_in(out), on, RecordedConsole().console, save_every=500)
    run.train(None, None)
    parameters = dict(run.trained.module.named_parameters())
    gradients = {f"gradient {name}": each.grad for name, each in parameters.items() if each.grad is not None}
    return gradients | {name: each.detach() for name, each in parameters.items()}


@contextmanager
def at_batch(number: int, happens: Callable[[], object]) -> Iterator[None]:
    """Call a function when the batch of this number, counted over all phases, is built."""
    real, numbers = BatchBuilder.__call__, iter(range(10**6))

    def call(self, *arguments):
        if next(numbers) == number:
            happens()
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchBuilder, "__call__", call)
        yield


if __name__ == "__main__":
    with devices("cpu") as joined:
        found = last_step(read_recipe(Path(sys.argv[1])), Path(sys.argv[2]), joined)
        safetensors.torch.save_file(found, Path(sys.argv[2]) / f"rank{joined.rank}.safetensors")

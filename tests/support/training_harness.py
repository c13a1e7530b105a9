"""A tiny recipe that trains in a second, and functions that run it.

As a program, one process of a run on several devices; see `main`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor

from edje.recipe import Recipe
from edje.recipe_file import read_recipe
from edje.training import devices as devices_module
from edje.training.batches.batch import BatchBuilder
from edje.training.batches.plan import CaptionOrder
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


@contextmanager
def shown_captions() -> Iterator[list[list[int]]]:
    """A list to which every batch that is built appends its captions, on all devices together."""
    real, shown = CaptionOrder.batch, list[list[int]]()

    def batch(self, number):
        captions = real(self, number)
        shown.append(captions.tolist())
        return captions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionOrder, "batch", batch)
        yield shown


def run_processes(num_processes: int, *words: object) -> list[str]:
    """Run this file as a program in several connected processes. Returns their outputs; all must end with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__)
    environment = os.environ | {
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(script.parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, words)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_processes)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes, "\n".join(outputs)
    return outputs


def main(mode: str, *words: str) -> None:
    """One process of a run on several devices."""
    if mode == "long_wait":  # one process works for longer than an exchange of gradients may take
        devices_module._COLLECTIVE_TIMEOUT = timedelta(seconds=1)
    with devices("cpu") as connected:
        if mode == "long_wait":
            if connected.leads:
                threading.Event().wait(3)
            connected.wait()
            print(connected.any(connected.rank == 1))
            return
        recipe, out = read_recipe(Path(words[0])), Path(words[1])
        if mode == "last_step":
            found = last_step(recipe, out, connected)
            safetensors.torch.save_file(found, out / f"rank{connected.rank}.safetensors")
        elif mode == "interrupt":  # at the batch of this number
            console = RecordedConsole().console
            with shown_captions() as shown, at_batch(int(words[2]), lambda: signal.raise_signal(signal.SIGTERM)):
                try:
                    start_run(recipe, folders_in(out), connected, console, save_every=500)
                except KeyboardInterrupt:
                    print(json.dumps(shown))


if __name__ == "__main__":
    main(*sys.argv[1:])

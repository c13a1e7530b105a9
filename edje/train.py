"""`python -m edje.train RECIPE --out DIR`: train a model by a recipe; `torchrun` for several GPUs.

The same command goes on where a stopped run was saved last. Ends with 0, with 1 and a sentence if recipe, data or model
cannot be used, and with 130 when it was stopped by Ctrl-C or SIGTERM, its state saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from edje.checkpoint import CheckpointError
from edje.data.dataset import DataError
from edje.features.storage import FeaturesError
from edje.images import ImageError
from edje.imports.bert import BertError
from edje.imports.sources import SourceError
from edje.optional import PackageMissing
from edje.recipe import RecipeError, read_recipe
from edje.towers.base import TowerError
from edje.training.devices import DeviceError, devices
from edje.training.interrupt import sigterm_as_interrupt
from edje.training.loop import TrainingStopped
from edje.training.run import Places, start_run
from edje.training.state import StateError
from edje.vocabulary import VocabularyError

#: What is wrong with the input, each told in a sentence.
_TOLD = (
    BertError,
    CheckpointError,
    DataError,
    DeviceError,
    FeaturesError,
    ImageError,
    OSError,  # a folder that cannot be written, a full disk
    PackageMissing,
    RecipeError,
    SourceError,
    StateError,
    TowerError,
    TrainingStopped,
    VocabularyError,
)


def main(
    recipe: Annotated[Path, typer.Argument(help="TOML file; see recipes/.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, metrics and resumable state.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help='Change a value, e.g. joint.kind="late" or phase.0.epochs=2.')
    ] = None,
    features: Annotated[Path, typer.Option(help="Folder for what the frozen tower sees; shared by runs.")] = Path(
        "build/features"
    ),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch on a CPU.", min=1)] = None,
    save_every: Annotated[int, typer.Option(help="Steps between two saved states.", min=1)] = 500,
) -> None:
    """Train a model by a recipe. Given again, the command goes on from the last saved state."""
    console = Console(stderr=True)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with sigterm_as_interrupt(), devices(device) as joined:
            wanted = read_recipe(recipe, set_ or ())
            checkpoint = start_run(wanted, Places(out, features), joined, console, save_every)
            if joined.leads:
                typer.echo(checkpoint)
    except _TOLD as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from the last saved state.", markup=False)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)

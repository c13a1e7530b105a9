"""`python -m edje.train RECIPE --out DIR`: train a model by a recipe; `torchrun` for several GPUs.

The same command resumes a stopped run from its latest saved state. The exit status is 0; 1 with a message if the
recipe, the data or a model cannot be used; or 130 after Ctrl-C or SIGTERM, with the state saved.
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
from edje.imports.bert_checkpoint import BertError
from edje.imports.sources import SourceError
from edje.optional import PackageMissing
from edje.recipe import RecipeError
from edje.recipe_file import read_recipe
from edje.towers.base import TowerError
from edje.training.devices import DeviceError, devices
from edje.training.interrupt import sigterm_as_interrupt
from edje.training.loop import TrainingStopped
from edje.training.run import RunFolders, start_run
from edje.training.state import StateError
from edje.vocabulary import VocabularyError

#: Errors that are reported by their message alone.
_REPORTED = (
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
    recipe: Annotated[Path, typer.Argument(help="TOML file; examples are in edje/recipes/.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, metrics and resumable state.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help='Change a value, e.g. joint.kind="late" or phase.0.epochs=2.')
    ] = None,
    features: Annotated[Path, typer.Option(help="Folder for the features of frozen towers, shared by runs.")] = Path(
        "build/features"
    ),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads.", min=1)] = None,
    save_every: Annotated[int, typer.Option(help="Steps between two saved states.", min=1)] = 500,
) -> None:
    """Train a model by a recipe. The same command resumes a stopped run from its latest saved state."""
    console = Console(stderr=True)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with sigterm_as_interrupt(), devices(device) as connected:
            run_folders = RunFolders(out, features)
            checkpoint = start_run(read_recipe(recipe, set_ or ()), run_folders, connected, console, save_every)
            if connected.leads:
                typer.echo(checkpoint)
    except _REPORTED as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("Stopped. The same command resumes from the latest saved state.", markup=False)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)

"""The command line of a program whose settings come from the environment: `--show-config`, or run."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer
from pydantic_settings import BaseSettings

from workers.errors import Misconfigured
from workers.read_settings import read_settings
from workers.show_config import show_config

S = TypeVar("S", bound=BaseSettings)


class Layout(enum.StrEnum):
    """How `--show-config` writes the settings."""

    table = "table"
    json = "json"


ShowConfig = Annotated[
    Layout | None, typer.Option("--show-config", help="List every setting (table or json; default table), then exit.")
]


def run_with_settings(program: str, kind: type[S], layout: Layout | None, run: Callable[[S], int]) -> None:
    """Read the settings and exit with the status of `run`; with a layout only list them. Exits with 2 if invalid."""
    try:
        settings = read_settings(kind)
    except Misconfigured as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if layout is not None:
        show_config(settings, sys.stdout, layout.value)
        return
    raise typer.Exit(run(settings))


def run_command(program: str, command: Callable[..., None]) -> None:
    """Run a command on the arguments of this process."""
    arguments = sys.argv[1:]
    if arguments[-1:] == ["--show-config"]:  # the option's value may be left out
        arguments.append(Layout.table)
    app = typer.Typer(add_completion=False)
    app.command(help="Settings come from the environment.")(command)
    app(arguments, prog_name=program)

"""The gateway: `python -m workers.gateway`. Runs until SIGTERM or SIGINT.

python -m workers.gateway --new-key NAME    # prints an API key, and its entry for GATEWAY_API_KEYS
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from typing import Annotated

import structlog
import typer

from edje.checkpoint import CheckpointError
from workers.errors import Misconfigured
from workers.gateway.api_keys import ApiKeys, new_key
from workers.gateway.replica import Gateway
from workers.gateway.settings import GatewaySettings
from workers.logs import set_up_logs
from workers.read_settings import near_misses, read_settings, secrets_of
from workers.runtime import Layout
from workers.show_config import show_config

log = structlog.get_logger(__name__)


PROGRAM = "python -m workers.gateway"


def command(
    layout: Annotated[
        Layout | None, typer.Option("--show-config", help="List every setting (table or json; default table), end.")
    ] = None,
    key_name: Annotated[
        str | None,
        typer.Option("--new-key", metavar="NAME", help="Print an API key and its settings entry, end."),
    ] = None,
) -> None:
    """Settings come from the environment."""
    if key_name is not None:
        raise typer.Exit(print_new_key(key_name))
    try:
        settings = read_settings(GatewaySettings)
    except Misconfigured as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if layout is not None:
        show_config(settings, sys.stdout, layout.value)
        return
    raise typer.Exit(run(settings))


def run(settings: GatewaySettings) -> int:
    """Run the gateway until it is stopped; return the process's exit status."""
    set_up_logs(log_format=settings.log_format, level=settings.log_level, secrets=secrets_of(settings))
    for sentence in near_misses(GatewaySettings):
        log.warning(sentence)
    try:
        with ExitStack() as stack:
            asyncio.run(Gateway(settings, stack).run())
    except (Misconfigured, CheckpointError) as error:
        log.error("the gateway cannot run", error=str(error), kind=type(error).__name__)
        return 1
    except Exception:
        log.exception("the gateway ends")
        return 1
    return 0


def print_new_key(name: str) -> int:
    key, entry = new_key(name)
    try:
        ApiKeys.parse(entry)
    except ValueError:
        print("invalid name: use 1 to 64 letters, digits, dots, dashes and underscores", file=sys.stderr)
        return 2
    print(f"key, to give to {name} only:\n  {key}\nentry, for GATEWAY_API_KEYS:\n  {entry}")
    return 0


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if arguments[-1:] == ["--show-config"]:  # the option's value may be left out
        arguments.append(Layout.table)
    app = typer.Typer(add_completion=False)
    app.command()(command)
    app(arguments, prog_name=PROGRAM)


if __name__ == "__main__":
    main()

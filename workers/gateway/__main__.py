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
from workers.command_line import ShowConfig, run_command, run_with_settings
from workers.errors import Misconfigured
from workers.gateway.api_keys import ApiKeys, new_key
from workers.gateway.replica import Gateway
from workers.gateway.settings import GatewaySettings
from workers.logs import set_up_logs
from workers.read_settings import near_misses, secrets_of

log = structlog.get_logger(__name__)


PROGRAM = "python -m workers.gateway"


def command(
    layout: ShowConfig = None,
    key_name: Annotated[
        str | None,
        typer.Option("--new-key", metavar="NAME", help="Print an API key and its settings entry, then exit."),
    ] = None,
) -> None:
    if key_name is not None:
        raise typer.Exit(print_new_key(key_name))
    run_with_settings(PROGRAM, GatewaySettings, layout, run)


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


if __name__ == "__main__":
    run_command(PROGRAM, command)

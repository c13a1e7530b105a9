"""The gateway: `python -m workers.gateway`. Runs until SIGTERM or SIGINT.

python -m workers.gateway --new-key NAME    # prints an API key, and its entry for GATEWAY_API_KEYS
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import ExitStack

import structlog

from edje.checkpoint import CheckpointError
from workers.errors import Misconfigured
from workers.gateway.api_keys import ApiKeys, new_key
from workers.gateway.replica import Gateway
from workers.gateway.settings import GatewaySettings
from workers.logs import set_up_logs
from workers.read_settings import near_misses, read_settings, secrets_of
from workers.show_config import show_config

log = structlog.get_logger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workers.gateway", description="Settings come from the environment."
    )
    parser.add_argument(
        "--show-config", nargs="?", const="table", choices=("table", "json"), help="list every setting, then exit"
    )
    parser.add_argument("--new-key", metavar="NAME", help="print an API key and its GATEWAY_API_KEYS entry, then exit")
    arguments = parser.parse_args()
    if arguments.new_key is not None:
        return print_new_key(arguments.new_key)
    try:
        settings = read_settings(GatewaySettings)
    except Misconfigured as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if arguments.show_config is not None:
        show_config(settings, sys.stdout, arguments.show_config)
        return 0
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
    sys.exit(main())

"""Reads settings from the environment, once, and refuses unknown variables with the worker's prefix.

A variable with a worker's prefix must be one of its settings. Variables that a platform injects are ignored: Kubernetes
sets `RERANK_PORT=tcp://…` or `KAFKA_SERVICE_HOST` for a Service named `rerank` or `kafka`, and images of Kafka
set their own `KAFKA_*`. Shared names are only reported as a warning, and only if they resemble a setting.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings

from protocols.validation import problems_in
from workers.errors import Misconfigured
from workers.secrets import secrets_in

S = TypeVar("S", bound=BaseSettings)

#: Names of the variables that Kubernetes (and container links) make from the name of a Service.
_SERVICE_LINK = re.compile(r"\w*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
_SHARED_PREFIXES = ("KAFKA_", "REDIS_")
#: Similarity that finds typing errors and abbreviations, but not KAFKA_HEAP_OPTS.
_SIMILARITY = 0.8


def read_settings(kind: type[S]) -> S:
    """Return the settings from the environment. Raises `Misconfigured` with one line for each fault."""
    names = variable_names(kind)
    faults = [*_unknown(kind, names.values(), os.environ)]
    settings: S | None = None
    try:
        settings = kind()
    except ValidationError as error:
        faults += problems_in(error, names=names)
    if settings is None or faults:
        raise Misconfigured("\n".join(faults))
    return settings


def variable_names(kind: type[BaseSettings]) -> dict[str, str]:
    """Return the environment variable of each setting."""
    prefix = kind.model_config.get("env_prefix", "")
    return {name: str(field.validation_alias or f"{prefix}{name}").upper() for name, field in kind.model_fields.items()}


def near_misses(kind: type[BaseSettings]) -> list[str]:
    """Return a sentence for each shared variable that is set, unknown, and similar to a setting."""
    known = list(variable_names(kind).values())
    return [
        f"{name} is not a setting; {suggestion}"
        for name, value in os.environ.items()
        if name.upper().startswith(_SHARED_PREFIXES)
        and name.upper() not in known
        and not _is_service_link(name.upper(), value)
        and (suggestion := _suggestion(name.upper(), known))
    ]


def secrets_of(settings: BaseSettings) -> list[str]:
    """Return every secret of the settings, to be masked in the log; of addresses only the passwords."""
    values = (getattr(settings, name) for name in type(settings).model_fields)
    return [found for value in values if isinstance(value, SecretStr) for found in secrets_in(value.get_secret_value())]


def _unknown(kind: type[BaseSettings], known: Iterable[str], environment: Mapping[str, str]) -> Iterable[str]:
    prefix = kind.model_config.get("env_prefix", "")
    known = set(known)
    for name, value in environment.items():
        upper = name.upper()
        if prefix and upper.startswith(prefix) and upper not in known and not _is_service_link(upper, value):
            suggestion = _suggestion(upper, known)
            yield f"{name} is not a setting{'; ' + suggestion if suggestion else ''} (--show-config lists them all)"


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(name)) or (name.endswith("_PORT") and bool(_SERVICE_ADDRESS.match(value)))


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=_SIMILARITY)
    return f"did you mean {close[0]}?" if close else ""

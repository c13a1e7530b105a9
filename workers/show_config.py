"""Lists every setting: its variable, value, source and meaning. Secrets are masked.

Knows no individual setting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TextIO

from pydantic import SecretStr
from pydantic_settings import BaseSettings
from rich.console import Console
from rich.table import Table

from workers.read_settings import variable_names
from workers.secrets import mask_setting

#: Width of output to a pipe or a file, so that each setting is one line.
UNBOUNDED_WIDTH = 240


@dataclass(frozen=True, slots=True)
class Shown:
    """One row of the list."""

    name: str
    value: str
    source: Literal["environment", "default"]
    meaning: str


def show_config(settings: BaseSettings, out: TextIO, layout: Literal["table", "json"] = "table") -> None:
    """Write all settings to `out`."""
    rows = list(shown(settings))
    if layout == "json":
        json.dump([asdict(row) for row in rows], out, indent=2)
        out.write("\n")
        return
    table = Table("name", "value", "source", "meaning", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.name, row.value, row.source, row.meaning)
    console = Console(file=out, markup=False, highlight=False, width=None if out.isatty() else UNBOUNDED_WIDTH)
    console.print(table)


def shown(settings: BaseSettings) -> Iterator[Shown]:
    """Yield the settings in the order of their definition."""
    names = variable_names(type(settings))
    for field, info in type(settings).model_fields.items():
        yield Shown(
            name=names[field],
            value=_text(getattr(settings, field)),
            source="environment" if field in settings.model_fields_set else "default",
            meaning=info.description or "",
        )


def _text(value: object) -> str:
    match value:
        case None:
            return ""
        case SecretStr():
            return mask_setting(value.get_secret_value())
        case tuple():
            return ",".join(map(str, value))
        case bool():
            return str(value).lower()
        case int() | float() | str() | Path():
            return str(value)
        case _:
            raise TypeError(f"a setting of type {type(value).__name__} cannot be shown")

"""A recipe as the table that its TOML file holds: where relative paths lead, and values that are changed by name.

Checks nothing; `edje.recipe` says what a recipe is.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

from edje.paths import data_from, path_from, source_from, tower_from

#: Everything that may be a path, and how it is read.
_PATHS: Final[Mapping[tuple[str, ...], Callable[[Path, Any], Any]]] = {
    ("data",): data_from,
    ("tower",): tower_from,
    ("start", "checkpoint"): path_from,
    ("vocabulary",): source_from,
    ("joint", "bert"): source_from,
    ("first_stage", "source"): source_from,
}


def located(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The table with its relative paths taken from this folder; those that are absolute stay."""
    table = deepcopy(table)
    for (*parents, last), take in _PATHS.items():
        place: Any = table
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            place[last] = take(folder, place[last])
    phases = table.get("phase")
    for phase in phases if isinstance(phases, list) else []:
        if isinstance(phase, dict) and "teacher" in phase:
            phase["teacher"] = path_from(folder, phase["teacher"])
    return table


def change(table: dict[str, Any], asked: str) -> None:
    """Set one value in place: `path.to.name=value`, the value as in TOML. Raises `ValueError`."""
    name, _, value = asked.partition("=")
    *parents, last = name.strip().split(".")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
        place: Any = table
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        place[int(last) if isinstance(place, list) else last] = parsed
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{asked!r} changes nothing: write path.to.name=value, the value as in TOML, text in quotes"
        ) from error

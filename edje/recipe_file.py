"""Reads a recipe from a TOML file, with changes from the command line.

Relative paths are relative to the recipe's folder; in a change, to the current folder.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from edje.paths import resolve_data, resolve_path, resolve_source, resolve_tower
from edje.recipe import Recipe, RecipeError

#: The fields that may contain a path, and the function that makes it absolute.
_PATHS: Final[Mapping[tuple[str, ...], Callable[[Path, Any], Any]]] = {
    ("data",): resolve_data,
    ("tower",): resolve_tower,
    ("start", "checkpoint"): resolve_path,
    ("vocabulary",): resolve_source,
    ("joint", "bert"): resolve_source,
    ("first_stage", "source"): resolve_source,
}


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file, with changes such as `joint.kind=late` or `phase.0.epochs=2`.

    Raises `RecipeError`.
    """
    try:
        table = _with_absolute_paths(tomllib.loads(path.read_text(encoding="utf-8")), path.parent)
    except (OSError, ValueError) as error:  # missing, not TOML, or not UTF-8
        raise RecipeError(f"{path} cannot be read: {error}") from error
    for change in changes:
        _apply(table, change)
    try:
        # As JSON, in which an array is a tuple and a table a dataclass.
        return Recipe.model_validate_json(json.dumps(_with_absolute_paths(table, Path())))
    except TypeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except ValidationError as error:
        raise RecipeError(f"{path}: {'; '.join(map(_described, error.errors(include_url=False)))}") from error


def _with_absolute_paths(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of the table whose relative paths are relative to `folder`."""
    table = deepcopy(table)
    for (*parents, last), make_absolute in _PATHS.items():
        parent: Any = table
        for name in parents:
            parent = parent.get(name) if isinstance(parent, dict) else None
        if isinstance(parent, dict) and last in parent:
            parent[last] = make_absolute(folder, parent[last])
    phases = table.get("phase")
    for phase in phases if isinstance(phases, list) else []:
        if isinstance(phase, dict) and "teacher" in phase:
            phase["teacher"] = resolve_path(folder, phase["teacher"])
    return table


def _apply(table: dict[str, Any], change: str) -> None:
    """Set one value of the table: `path.to.name=value`. A value that is not TOML is a text."""
    name, _, text = change.partition("=")
    *parents, last = name.strip().split(".")
    try:
        if not text.strip() or not last:
            raise ValueError("empty")
        target: Any = table
        for parent in parents:
            target = target[int(parent)] if isinstance(target, list) else target.setdefault(parent, {})
        target[int(last) if isinstance(target, list) else last] = _value(text.strip())
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{change!r} changes nothing: write path.to.name=value, where path.to.name is a field of the recipe and a "
            "phase is phase.0, phase.1, …"
        ) from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _described(error: ErrorDetails) -> str:
    """The field and what is wrong with it."""
    field = ".".join(map(str, error["loc"])) or "recipe"
    return f"{field}: {error['msg'].removeprefix('Value error, ')}"

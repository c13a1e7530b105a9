"""Resolves relative paths in a file against the folder of that file. Opens nothing.

Neither `~` nor environment variables are expanded. Values that are not text are returned unchanged, for the validation
that follows to report.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edje.imports.sources import HUB_PREFIX, PACKAGE_PREFIX, is_hub_repository

#: Fields of a dataset's description that are paths, in every kind of dataset.
_DATA_PATHS = ("json_path", "image_root", "csv_path", "lists_path", "folder", "leave_out")
_ONNX_PREFIX = "onnx:"


def resolve_path(folder: Path, value: Any) -> Any:
    """The path as an absolute path, relative to `folder`."""
    return str(folder.absolute() / value) if isinstance(value, str) and value else value


def resolve_source(folder: Path, value: Any) -> Any:
    """A source of weights (see `edje.imports.sources.find_source`), resolved where it is a path."""
    if not isinstance(value, str) or value.startswith((PACKAGE_PREFIX, HUB_PREFIX)):
        return value
    return value if is_hub_repository(value, folder / value) else resolve_path(folder, value)


def resolve_tower(folder: Path, value: Any) -> Any:
    """The name of a tower (see `edje.towers.sources`), resolved where it names a graph's file."""
    if not isinstance(value, str) or not value.startswith(_ONNX_PREFIX):
        return value
    return _ONNX_PREFIX + str(resolve_path(folder, value.removeprefix(_ONNX_PREFIX)))


def resolve_data(folder: Path, table: Any) -> Any:
    """The description of a dataset, or of several as `parts`, with its paths resolved."""
    if not isinstance(table, Mapping):
        return table
    resolved = {name: resolve_path(folder, value) if name in _DATA_PATHS else value for name, value in table.items()}
    if isinstance(parts := table.get("parts"), Mapping):
        resolved["parts"] = {name: resolve_data(folder, part) for name, part in parts.items()}
    return resolved

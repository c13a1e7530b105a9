"""Relative paths in a file are meant from that file's folder, wherever the program is started. Opens nothing.

Neither `~` nor environment variables are expanded. What is no text is handed on: to complain about it is for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edje.imports.sources import HUB_PREFIX, PACKAGE_PREFIX, is_on_the_hub

#: What of a table that describes a dataset is a path, whatever the kind of dataset.
_DATA_PATHS = ("json_path", "image_root", "csv_path", "folder")
_GRAPH_PREFIX = "onnx:"


def path_from(folder: Path, value: Any) -> Any:
    """A path, taken from `folder`."""
    return str(folder.absolute() / value) if isinstance(value, str) and value else value


def source_from(folder: Path, value: Any) -> Any:
    """A source of weights (see `edje.imports.sources.find_source`), taken from `folder` where it is a path."""
    if not isinstance(value, str) or value.startswith((PACKAGE_PREFIX, HUB_PREFIX)):
        return value
    return value if is_on_the_hub(value, folder / value) else path_from(folder, value)


def tower_from(folder: Path, value: Any) -> Any:
    """The name of a tower (see `edje.towers.sources`), taken from `folder` where it is a graph's file."""
    if not isinstance(value, str) or not value.startswith(_GRAPH_PREFIX):
        return value
    return _GRAPH_PREFIX + str(path_from(folder, value.removeprefix(_GRAPH_PREFIX)))


def data_from(folder: Path, table: Any) -> Any:
    """A table that describes a dataset, its paths taken from `folder`; of several datasets, those of each."""
    if not isinstance(table, Mapping):
        return table
    located = {name: path_from(folder, value) if name in _DATA_PATHS else value for name, value in table.items()}
    if isinstance(parts := table.get("parts"), Mapping):
        located["parts"] = {name: data_from(folder, part) for name, part in parts.items()}
    return located

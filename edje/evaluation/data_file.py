"""Reads the description of a dataset from a file: a recipe with a table `data`, or that table alone.

TOML, or JSON such as the `recipe.json` of a training run.
"""

from __future__ import annotations

import json
import tomllib
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from edje.data.dataset import DataError
from edje.data.spec import DataSpec
from edje.paths import resolve_data
from protocols.validation import first_problem


@cache
def _adapter() -> TypeAdapter[DataSpec]:
    return TypeAdapter(DataSpec)


def read_data_spec(path: Path) -> DataSpec:
    """The dataset that a file describes; relative paths start at the file's folder. Raises `DataError`."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # invalid TOML or JSON, or not UTF-8
        raise DataError(
            f"{path} is not a valid {'JSON' if path.suffix == '.json' else 'TOML'} file: {error}"
        ) from error
    try:
        return _adapter().validate_python(resolve_data(path.parent, content.get("data", content)))
    except ValidationError as error:
        raise DataError(f"{path} does not describe a dataset: {first_problem(error, root='the dataset')}") from error

"""Reads which dataset is meant from a TOML file: a recipe with a table `data`, or that table alone."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from edje.data.dataset import DataError
from edje.data.spec import DataSpec


@cache
def _adapter() -> TypeAdapter[DataSpec]:
    return TypeAdapter(DataSpec)


def read_data_spec(path: Path) -> DataSpec:
    """The dataset a file names. Raises `DataError`."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise DataError(f"{path} is no TOML file: {error}") from error
    try:
        return _adapter().validate_python(content.get("data", content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the dataset"
        raise DataError(f"{path} does not say which dataset is meant: {where}: {first['msg']}") from error

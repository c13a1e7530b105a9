"""Packages that only some models need, imported when one of those is met."""

from __future__ import annotations

import importlib
from typing import Any


class PackageMissing(RuntimeError):
    """A model needs a package that is not installed; the message says which, and how it is had."""


def need(package: str, extra: str) -> Any:
    """The package, imported. Raises `PackageMissing`."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise PackageMissing(
            f"this model needs the package {package}, which is not installed: install the extra {extra!r} "
            f"(pip install 'edje-rerank[{extra}]'), or the package itself"
        ) from error

"""Imports of packages that only some models need."""

from __future__ import annotations

import importlib
from typing import Any


class PackageMissing(RuntimeError):
    """A package that this model needs is not installed; the message gives the command that installs it."""


def require_package(package: str, extra: str) -> Any:
    """Import a package, or raise `PackageMissing`; `extra` is the extra of `edje-rerank` that installs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise PackageMissing(
            f"this model needs the package {package}, which is not installed: install the extra {extra!r} "
            f"(pip install 'edje-rerank[{extra}]'), or the package itself"
        ) from error

"""Resolves a source of weights to a local path: a path, a folder of an installed package, or a hub repository.

Runs no code of the packages, and uses the network only for hub repositories.

    path/to/file.pth, path/to/folder
    package:NAME/folder/inside
    hub:OWNER/NAME, or OWNER/NAME where no such path exists
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from edje.optional import PackageMissing, require_package

PACKAGE_PREFIX, HUB_PREFIX = "package:", "hub:"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: Name suffixes of files: a missing file is not taken for a repository.
_FILES = {".pth", ".pt", ".bin", ".json", ".txt", ".safetensors"}


class SourceError(ValueError):
    """The source does not exist or cannot be fetched; the message says what to do."""


def find_source(source: str, patterns: Sequence[str]) -> Path:
    """The local path of a source; from a hub repository, only files that match a pattern. Raises `SourceError`."""
    if source.startswith(PACKAGE_PREFIX):
        package, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
        return package_folder(package, inside)
    if source.startswith(HUB_PREFIX):
        return hub_folder(source.removeprefix(HUB_PREFIX), patterns)
    path = Path(source)
    if is_hub_repository(source, path):
        return hub_folder(source, patterns)
    if not path.exists():
        raise SourceError(f"{source} does not exist: give a file, a folder, package:NAME/folder or hub:OWNER/NAME")
    return path


def is_hub_repository(source: str, path: Path) -> bool:
    """Whether a source without a prefix names a hub repository: it has the form of one, and no such path exists."""
    return not path.exists() and path.suffix not in _FILES and bool(_REPOSITORY.fullmatch(source))


def package_folder(package: str, inside: str = "") -> Path:
    """A folder of an installed package, found without running the package's code. Raises `SourceError`."""
    parts = PurePosixPath(inside).parts
    if not package.isidentifier() or ".." in parts or PurePosixPath(inside).is_absolute():
        raise SourceError(f"{package}/{inside} names no folder of a package: write package:NAME/folder")
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not locations:
        raise SourceError(f"the package {package} is not installed: install it, or give a folder")
    folder = Path(locations[0], *parts)
    if not folder.is_dir():
        raise SourceError(f"the package {package} has no folder {inside!r}")
    return folder


def hub_folder(
    repository: str, patterns: Sequence[str], *, endpoint: str | None = None, cache: Path | None = None
) -> Path:
    """A local copy of the repository's files that match, downloaded if necessary. Raises `SourceError`.

    `endpoint` and `cache` default to the settings of huggingface_hub.
    """
    try:
        folder = require_package("huggingface_hub", "train").snapshot_download(
            repository, allow_patterns=list(patterns), endpoint=endpoint, cache_dir=cache
        )
    except PackageMissing as error:
        raise SourceError(str(error)) from error
    # OSError is the base class of its network and HTTP errors, ValueError of its errors about names.
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{repository} cannot be fetched from the hub ({_first_line(error)}): "
            "check the name and the network, or download the file and give its path"
        ) from error
    return Path(folder)


def only_file(path: Path, pattern: str) -> Path:
    """The only file in a folder that matches the pattern, or the path itself if it is a file. Raises `SourceError`."""
    if not path.is_dir():
        return path
    found = sorted(path.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise SourceError(f"{path} should hold one file {pattern} and holds {names}: give the file's path")
    return found[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__

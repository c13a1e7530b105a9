"""Turns the name of a source of weights into a local path: a path, a folder of an installed package, or the hub.

Runs no code of the packages it looks into, and reaches the network for names on the hub only.

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
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
#: What a name ends in that means a file, even one that does not exist.
_FILES = {".pth", ".pt", ".bin", ".json", ".txt", ".safetensors"}


class SourceError(ValueError):
    """There is nothing under this name; the message says what to do."""


def find_source(source: str, patterns: Sequence[str]) -> Path:
    """The local path of a source; of a hub's repository, the files that match a pattern. Raises `SourceError`."""
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
    """Whether a source without a prefix means a repository, because no file or folder is where it points as a path."""
    return not path.exists() and path.suffix not in _FILES and bool(_ON_THE_HUB.fullmatch(source))


def package_folder(package: str, inside: str = "") -> Path:
    """A folder of an installed package, found without running the package's code. Raises `SourceError`."""
    parts = PurePosixPath(inside).parts
    if not package.isidentifier() or ".." in parts or PurePosixPath(inside).is_absolute():
        raise SourceError(f"{package}/{inside} is no folder of a package: write package:NAME/folder")
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise SourceError(f"the package {package} is not installed: install it, or give a folder")
    folder = Path(places[0], *parts)
    if not folder.is_dir():
        raise SourceError(f"the package {package} has no folder {inside!r}")
    return folder


def hub_folder(
    repository: str, patterns: Sequence[str], *, endpoint: str | None = None, cache: Path | None = None
) -> Path:
    """A local copy of the repository's files that match, downloaded unless it is there. Raises `SourceError`.

    `endpoint` and `cache` are huggingface_hub's own settings where they are None.
    """
    try:
        folder = require_package("huggingface_hub", "train").snapshot_download(
            repository, allow_patterns=list(patterns), endpoint=endpoint, cache_dir=cache
        )
    except PackageMissing as error:
        raise SourceError(str(error)) from error
    # OSError is what its network and HTTP errors have in common, ValueError what its complaints about names have.
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{repository} cannot be fetched from the hub ({_first_line(error)}): "
            "check the name and the network, or download the file and give its path"
        ) from error
    return Path(folder)


def only_file(folder: Path, pattern: str) -> Path:
    """The one file of a folder that matches; a file given as the folder is itself it. Raises `SourceError`."""
    if not folder.is_dir():
        return folder
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise SourceError(f"{folder} should hold one file {pattern} and holds {names}: give the file's path")
    return found[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__

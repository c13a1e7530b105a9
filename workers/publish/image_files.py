"""Finds image files and builds their events.

Reads names and sizes only; the ingest worker checks whether a file is an image. Knows nothing of Kafka.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from edje.images import SUFFIXES
from protocols.events import ImageNew
from protocols.validation import problems_in

SourceKind = Literal["uri", "data"]


class AmbiguousName(ValueError):
    """Two files would have the same image id."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file and the id of its image."""

    path: Path
    image_id: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that cannot be published, and why."""

    path: Path
    reason: str


def image_files(paths: Iterable[Path], *, id_prefix: str = "", keep_extension: bool = False) -> list[ImageFile]:
    """Return every image file in the folders, and every named file, ordered by id.

    The id is the path below the given folder, without the extension. Raises `AmbiguousName`.
    """
    found: dict[str, Path] = {}
    for given in paths:
        root = given if given.is_dir() else given.parent
        for path in _files_in(given) if given.is_dir() else [given]:
            relative = path.relative_to(root)
            image_id = id_prefix + (relative if keep_extension else relative.with_suffix("")).as_posix()
            other = found.setdefault(image_id, path)
            if other != path:
                raise AmbiguousName(f"{printable(other)} and {printable(path)} would both be {printable(image_id)!r}")
    return [ImageFile(found[image_id], image_id) for image_id in sorted(found)]


def image_events(
    files: Sequence[ImageFile], source: SourceKind, *, max_data_bytes: int
) -> Iterator[ImageNew | Refused]:
    """Yield the event of each file, or the reason why it has none; each file is read only when needed."""
    for file in files:
        try:
            if source == "uri":
                yield ImageNew(image_id=file.image_id, uri=file.path.resolve().as_uri())
            elif (num_bytes := file.path.stat().st_size) > max_data_bytes:
                yield Refused(file.path, f"{num_bytes} bytes; a message carries at most {max_data_bytes}")
            else:
                yield ImageNew(image_id=file.image_id, data=file.path.read_bytes())
        except ValidationError as error:
            yield Refused(file.path, "; ".join(problems_in(error)))
        except OSError as error:
            yield Refused(file.path, error.strerror or type(error).__name__)


def printable(name: object) -> str:
    """Return a name as printable text: control characters and undecodable bytes are escaped."""
    text = str(name).encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _files_in(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]

"""Writes an engine directory atomically and refuses to overwrite anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edje.files import draft_directory


class DirectoryExists(Exception):
    """The target directory exists and may not be replaced; the message says what to do."""


def refuse_to_overwrite(target: Path, mark: str, *, replace: bool) -> None:
    """Raise `DirectoryExists` unless `target` is new or empty, or holds the file `mark` and may be replaced.

    A directory without the mark is not an engine directory and is never deleted, also not with `replace`.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / mark).is_file():
        raise DirectoryExists(f"{target} exists and holds no {mark}: choose another directory")
    if not replace:
        raise DirectoryExists(f"{target} exists: choose another directory, or replace it with --force")


@contextmanager
def draft_of(target: Path, mark: str, *, replace: bool) -> Iterator[Path]:
    """Yield a temporary directory, which replaces `target` when the block ends without an error.

    Until then `target` keeps its former content. Raises `DirectoryExists`.
    """
    refuse_to_overwrite(target, mark, replace=replace)
    with draft_directory(target) as draft:
        yield draft
        refuse_to_overwrite(target, mark, replace=replace)  # another build may have written it in the meantime

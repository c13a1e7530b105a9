"""A directory that is written whole or not at all: what is half done has another name.

Knows files only.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DirectoryExists(Exception):
    """Writing would overwrite something; the message says how to allow it."""


def refuse_to_overwrite(target: Path, mark: str, *, replace: bool) -> None:
    """Raise `DirectoryExists` unless `target` is new or empty, or holds the file `mark` and may be replaced.

    Without the mark it is something else, and is not deleted whatever was allowed.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / mark).is_file():
        raise DirectoryExists(f"{target} exists and holds no {mark}: choose another directory")
    if not replace:
        raise DirectoryExists(f"{target} exists: choose another directory, or replace it with --force")


@contextmanager
def draft_of(target: Path, mark: str, *, replace: bool) -> Iterator[Path]:
    """A directory beside `target` to write into: takes that name when the block ends well, and goes when it does not.

    A former one stays in its place until then. Raises `DirectoryExists`.
    """
    refuse_to_overwrite(target, mark, replace=replace)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield draft
        for path in draft.iterdir():
            path.chmod(0o644)
            _sync(path)
        draft.chmod(0o755)  # a temporary directory is its maker's alone; a worker may run as another user
        _sync(draft)
        refuse_to_overwrite(target, mark, replace=replace)  # a build takes minutes: somebody may have been faster
        if target.exists():
            former = draft.with_name(f"{draft.name}.former")
            target.rename(former)
            try:
                draft.rename(target)
            except OSError:
                former.rename(target)
                raise
            shutil.rmtree(former)
        else:
            draft.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Have the content of a file, or the names in a directory, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

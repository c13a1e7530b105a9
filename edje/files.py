"""Atomic writes of files and directories: temporary sibling, fsync, rename.

A reader sees the old content or the new, never a part of either. The next write to the same path removes the drafts of
killed processes. Knows nothing of the content.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Flag of renameat2(2): swap two names in one step.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
#: File systems and kernels that cannot swap names answer with one of these.
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP}
#: A younger draft may belong to a process that has not yet locked the draft.
_MIN_ABANDONED_AGE_S = 60


def write_file(path: Path, content: bytes | str) -> None:
    """Write or replace a file atomically; text is written as UTF-8."""
    with draft_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def draft_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file, which replaces `path` when the block ends without an error.

    The temporary file lies in the same directory and keeps the suffix, because some writers append one.
    """
    target = _resolved(path)
    _remove_abandoned_drafts(target)
    draft = _temporary_sibling(target, target.suffix)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    with _locked(draft):
        try:
            yield draft
            sync(draft)
            draft.replace(target)
            sync(target.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


@contextmanager
def draft_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory, which replaces `path` when the block ends without an error.

    Its parent is created if necessary. Until the end `path` keeps its former content.
    """
    target = _resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_drafts(target)
    draft = _temporary_sibling(target)
    draft.mkdir()
    with _locked(draft):
        try:
            yield draft
            replace_directory(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def replace_directory(draft: Path, path: Path) -> None:
    """Rename a finished directory to `path` on the same file system, and remove the former directory there, if any.

    The content is on the disk and readable by every user before the rename. Where the file system can swap two names,
    `path` always exists; elsewhere the former directory is renamed first, and renamed back if the second rename fails.
    """
    target = _resolved(path)
    for each in (*draft.rglob("*"), draft):
        # Some writers create files for their user alone; a worker may run as another user.
        each.chmod(0o755 if each.is_dir() else 0o644)
        sync(each)
    if not os.path.lexists(target):
        draft.rename(target)
    elif _exchange(draft, target):
        _remove(draft)
    else:
        former = _temporary_sibling(target)
        target.rename(former)
        try:
            draft.rename(target)
        except OSError:
            former.rename(target)
            raise
        _remove(former)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _resolved(path: Path) -> Path:
    """The path behind symbolic links: the target of a link is replaced, and the link stays."""
    return Path(os.path.realpath(path))


def _temporary_sibling(path: Path, suffix: str = "") -> Path:
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}.draft{suffix}")


def _remove_abandoned_drafts(path: Path) -> None:
    """Remove the drafts of `path` that no running process writes."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}-*.draft*"):
        with suppress(OSError):  # locked, already removed, or on a file system without locks
            if time.time() - draft.stat().st_mtime > _MIN_ABANDONED_AGE_S:
                with _locked(draft, required=True):
                    _remove(draft)


@contextmanager
def _locked(path: Path, *, required: bool = False) -> Iterator[None]:
    """Hold a lock on a file or directory, which ends with the process. Raises `OSError` if `required` and not free."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if required:
                raise
        yield
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step. False where the platform or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()

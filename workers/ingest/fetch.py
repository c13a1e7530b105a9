"""Reads the bytes behind an image address: files, http(s), and object stores through fsspec.

Knows what may be read (by the policy) and how much; knows nothing of images, events or retries.

Only the object stores are read by fsspec's filesystems. HTTP has its reasons in `fetch_http`; a file is opened here
because its kind and its place must be checked on the very file that is opened, before it can block (a named pipe).
Object stores use the credentials of the environment, as their packages document.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
from aiohttp.abc import AbstractResolver
from fsspec.asyn import sync

from workers.errors import Misconfigured, Poison, Transient
from workers.ingest.address_policy import AddressPolicy
from workers.ingest.fetch_http import FetchLimits, HttpReader

#: Each is read by a package of its own, which the extra of the same name installs.
_OBJECT_STORE_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
#: Where the errors of those packages come from, besides OSError: all of them mean that the store did not answer.
_OBJECT_STORE_ERRORS = frozenset({"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs"})
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class ImageFetcher:
    """Reads image addresses, each within the policy and the limits. Safe to call from many threads."""

    def __init__(
        self,
        policy: AddressPolicy,
        limits: FetchLimits,
        *,
        resolver: AbstractResolver | None = None,
        object_store_class: Callable[[str], Callable[[], Any]] = fsspec.get_filesystem_class,
    ) -> None:
        """Raises `Misconfigured` where the policy allows a scheme whose package is not installed."""
        self._object_stores = {
            scheme: _object_store(scheme, object_store_class)
            for scheme in sorted(policy.schemes & _OBJECT_STORE_PACKAGES.keys())
        }
        self._policy = policy
        self._limits = limits
        self._http = HttpReader(policy, limits, resolver)
        self._file_roots = tuple(os.path.realpath(root) for root in policy.file_roots)

    def fetch(self, uri: str) -> bytes:
        """The bytes behind an address.

        Raises `Poison` (not allowed, not there, too large) or `Transient` (not now). No message holds credentials or
        a query.
        """
        scheme, separator, rest = uri.partition("://")
        scheme = scheme.lower()
        if not separator or _CONTROL.search(uri):
            raise Poison("uri_invalid", "the image address is not of the form scheme://...")
        self._policy.check_scheme(scheme)
        if scheme == "file":
            return self._read_file(uri)
        if scheme in _OBJECT_STORE_PACKAGES:
            return self._read_object(scheme, rest)
        return self._http.read(uri)

    def close(self) -> None:
        """Cut all connections; whoever fetches meanwhile gets `Transient`."""
        self._http.close()

    def _read_file(self, uri: str) -> bytes:
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise Poison("uri_invalid", "a file address is file:///path, with ? and # in the path as %3F and %23")
        try:
            written = unquote(parts.path, errors="strict")
        except UnicodeDecodeError:
            raise Poison("uri_invalid", "the path of the file address is not UTF-8") from None
        if _CONTROL.search(written):
            raise Poison("uri_invalid", "the path of the file address holds control characters")
        path = os.path.realpath(written)
        if not any(os.path.commonpath((root, path)) == root for root in self._file_roots):
            raise Poison("uri_not_allowed", "the image address may not be read: the file is in none of the file roots")
        try:
            return self._read_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            raise Poison("image_not_found", f"{path}: no such file") from None
        except PermissionError:
            raise Poison("image_forbidden", f"{path}: not readable for the worker") from None
        except IsADirectoryError:
            raise Poison("uri_not_allowed", f"{path}: not a regular file") from None
        except OSError as error:
            raise Transient(f"{path}: {error.strerror}") from None

    def _read_regular(self, path: str) -> bytes:
        with open(path, "rb", opener=_open_without_surprises) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Poison("uri_not_allowed", f"{path}: not a regular file")
            return self._bounded(file.read(self._limits.max_bytes + 1), path)

    def _read_object(self, scheme: str, rest: str) -> bytes:
        bucket, _, key = rest.partition("/")
        if not _BUCKET.fullmatch(bucket) or not key:
            raise Poison("uri_invalid", f"an object address is {scheme}://bucket/key")
        self._policy.check_host(bucket)
        where = f"{scheme}://{bucket}/{key.partition('?')[0]}"
        try:
            store = self._object_stores[scheme]()
            end = self._limits.max_bytes + 1
            # One ranged read on the store's own loop: bounded in bytes and in time.
            data: bytes = sync(store.loop, store._cat_file, rest, start=0, end=end, timeout=self._limits.timeout_s)
        except FileNotFoundError:
            raise Poison("image_not_found", f"{where}: no such object") from None
        except PermissionError:
            raise Poison("image_forbidden", f"{where}: not readable for the worker") from None
        except Exception as error:
            if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _OBJECT_STORE_ERRORS:
                raise Transient(f"{where}: {type(error).__name__}") from None
            raise
        return self._bounded(data, where)

    def _bounded(self, data: bytes, where: str) -> bytes:
        if len(data) > self._limits.max_bytes:
            raise Poison("image_too_large", f"{where}: more than {self._limits.max_bytes} bytes")
        return data


def _object_store(scheme: str, class_of: Callable[[str], Callable[[], Any]]) -> Callable[[], Any]:
    try:
        return class_of(scheme)
    except ImportError as error:
        package = _OBJECT_STORE_PACKAGES[scheme]
        raise Misconfigured(
            f"{scheme} is among the allowed schemes, but its package {package} cannot be loaded: "
            f"install the extra {scheme} (pip install 'edje-rerank[{scheme}]'), or take {scheme} out"
        ) from error


def _open_without_surprises(path: str, flags: int) -> int:
    """Neither follow a link that took the file's place meanwhile, nor wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

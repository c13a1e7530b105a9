"""Reads the bytes behind an image address: files, http(s) and object stores.

All fetches share one event loop on a separate thread. The loop's executor reads files and looks up names, because both
block. Knows which addresses may be read (by the policy) and how many bytes; knows nothing of images, events
and retries.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from aiohttp.abc import AbstractResolver

from workers.errors import Poison, Transient
from workers.ingest.address_policy import AddressPolicy
from workers.ingest.addresses import ImageAddress, shown
from workers.ingest.fetch_http import FetchLimits, HttpReader
from workers.ingest.fetch_objects import ObjectReader, open_store_class


class ImageFetcher:
    """Reads image addresses, each within the policy and the limits. May be called from any thread."""

    def __init__(
        self,
        policy: AddressPolicy,
        limits: FetchLimits,
        *,
        max_fetches: int,
        resolver: AbstractResolver | None = None,
        store_class: Callable[[str], Callable[..., Any]] = open_store_class,
    ) -> None:
        """`max_fetches` is the most fetches that the caller has open at once.

        Raises `Misconfigured` if the policy allows a scheme whose package is not installed.
        """
        self._policy = policy
        self._limits = limits
        self._objects = ObjectReader(policy, limits, store_class)
        self._file_roots = tuple(os.path.realpath(root) for root in policy.file_roots)
        self._executor = ThreadPoolExecutor(max_fetches, thread_name_prefix="image-file")
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(self._executor)
        self._thread = threading.Thread(target=self._loop.run_forever, name="image-fetch", daemon=True)
        self._thread.start()
        self._http: HttpReader = self._on_loop(self._make_http_reader(resolver)).result()

    def start(self, address: ImageAddress) -> Future[bytes]:
        """Start reading an address.

        The future fails with `Poison` (forbidden, missing, too large) or `Transient` (try again), and is cancelled by
        `close`. No message shows credentials or a query.
        """
        return self._on_loop(self._read(address))

    def close(self) -> None:
        """Cancel the fetches under way, close all connections and end the threads."""
        if self._loop.is_closed():
            return
        self._on_loop(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _on_loop(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _make_http_reader(self, resolver: AbstractResolver | None) -> HttpReader:
        return HttpReader(self._policy, self._limits, resolver)

    async def _close(self) -> None:
        fetches = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        await self._objects.close()
        await self._http.close()

    async def _read(self, address: ImageAddress) -> bytes:
        self._policy.check_scheme(address.scheme)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                if address.url is not None:
                    return await self._http.read(address.url)
                if address.scheme == "file":
                    data: bytes = await self._loop.run_in_executor(None, partial(self._read_file, address.path))
                    return data
                return await self._objects.read(address.scheme, address.path)
        except TimeoutError:
            where = shown(address.url) if address.url is not None else address.host
            raise Transient(f"{where}: no answer within {self._limits.timeout_s:g} s") from None

    def _read_file(self, written: str) -> bytes:
        try:
            path = os.path.realpath(written)
            if not any(os.path.commonpath((root, path)) == root for root in self._file_roots):
                raise Poison(
                    "uri_not_allowed", "the image address may not be read: the file is outside of INGEST_FILE_ROOTS"
                )
            return self._read_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            raise Poison("image_not_found", f"{path}: no such file") from None
        except PermissionError:
            raise Poison("image_forbidden", f"{path}: the worker may not read this file") from None
        except IsADirectoryError:
            raise Poison("uri_not_allowed", f"{path}: not a regular file") from None
        except ValueError:  # half a surrogate pair, for example
            raise Poison("uri_invalid", "the path of the file address is not valid on this system") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                raise Poison("uri_invalid", f"{path[:200]}: {error.strerror}") from None
            if error.errno == errno.ENXIO:  # a socket, or a device without a driver
                raise Poison("uri_not_allowed", f"{path}: not a regular file") from None
            raise Transient(f"{path}: {error.strerror}") from None

    def _read_regular(self, path: str) -> bytes:
        # Not opened by fsspec: the file's kind must be checked on the opened file, before a read can block.
        with open(path, "rb", opener=_open_without_following) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Poison("uri_not_allowed", f"{path}: not a regular file")
            data = file.read(self._limits.max_bytes + 1)
        if len(data) > self._limits.max_bytes:
            raise Poison("image_too_large", f"{path}: more than {self._limits.max_bytes} bytes")
        return data


def _open_without_following(path: str, flags: int) -> int:
    """Open a file without following a link and without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

"""Reads images from object stores through the packages s3fs and gcsfs, which the extras `s3` and `gs` install.

The packages take credentials from the environment, as they document. They run on the event loop of the fetches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from workers.errors import Misconfigured, Poison, Transient
from workers.ingest.address_policy import OBJECT_SCHEMES, AddressPolicy
from workers.ingest.fetch_http import FetchLimits

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
#: Packages whose errors, like `OSError`, report that the store did not answer.
_STORE_ERRORS = frozenset({"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs"})

#: The S3 client makes up to 25 attempts by default; the caller retries instead.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"max_attempts": 1}}}, "gs": {}}
#: Error codes of a refused object; "" if the package gives no code.
_FORBIDDEN = frozenset({"AccessDenied", "AllAccessDisabled", "403", ""})
#: Error codes of a ranged read of an empty object.
_EMPTY = frozenset({"InvalidRange", "416"})


def open_store_class(scheme: str) -> Callable[..., Any]:
    """Return the file system class of a scheme. Raises `ImportError` if its package is not installed."""
    if scheme == "s3":
        from s3fs import S3FileSystem

        return S3FileSystem  # type: ignore[no-any-return]
    # From the module `core`: the class that the package exports prefers gRPC, which proxies and emulators lack.
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem  # type: ignore[no-any-return]


class ObjectReader:
    """Reads objects, each within the policy and the limits."""

    def __init__(
        self, policy: AddressPolicy, limits: FetchLimits, store_class: Callable[[str], Callable[..., Any]]
    ) -> None:
        """Raises `Misconfigured` if the policy allows a scheme whose package is not installed."""
        self._policy = policy
        self._limits = limits
        self._classes = {scheme: _loaded(scheme, store_class) for scheme in sorted(policy.schemes & OBJECT_SCHEMES)}
        self._stores: dict[str, Any] = {}
        self._sessions: list[Any] = []
        self._making = asyncio.Lock()

    async def read(self, scheme: str, path: str) -> bytes:
        """Return an object's bytes. Raises `Poison` or `Transient`; no message shows a secret."""
        bucket, _, key = path.partition("/")
        self._policy.check_bucket(bucket)
        where = f"{scheme}://{bucket}/{key.partition('?')[0]}"
        try:
            store = await self._store(scheme)
            # One ranged read: bounded in bytes.
            data: bytes = await store._cat_file(path, start=0, end=self._limits.max_bytes + 1)
        except FileNotFoundError:
            raise Poison("image_not_found", f"{where}: no such object") from None
        except TimeoutError:
            raise
        except Exception as error:
            if _code(error) in _EMPTY:
                return b""
            if _is_refused(error):
                sentence = f"{where}: the worker's credentials may not read this object"
                raise Poison("image_forbidden", sentence) from None
            if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _STORE_ERRORS:
                raise Transient(f"{where}: {type(error).__name__} {_code(error)}".rstrip()) from None
            raise
        if len(data) > self._limits.max_bytes:
            raise Poison("image_too_large", f"{where}: more than {self._limits.max_bytes} bytes")
        return data

    async def close(self) -> None:
        """Close the connections to the stores."""
        for session in self._sessions:
            await session.close()

    async def _store(self, scheme: str) -> Any:
        """Return the file system of a scheme, made on first use: making it may look for credentials on the network."""
        async with self._making:
            store: Any = self._stores.get(scheme)
            if store is None:
                make = partial(self._classes[scheme], asynchronous=True, skip_instance_cache=True, **_OPTIONS[scheme])
                store = await asyncio.get_running_loop().run_in_executor(None, make)
                store.retries = 1  # the caller retries
                set_session = getattr(store, "set_session", None) or store._set_session
                self._sessions.append(await set_session())
                self._stores[scheme] = store
        return store


def _code(error: Exception) -> str:
    """Return the code of an object store's error reply: a word from S3, a status from Google Cloud Storage."""
    reply = getattr(error.__cause__, "response", None)
    code = reply.get("Error", {}).get("Code", "") if isinstance(reply, dict) else getattr(error, "code", "")
    return str(code)[:40]


def _is_refused(error: Exception) -> bool:
    """Whether this object is refused, as opposed to credentials that are invalid or have expired."""
    if isinstance(error, PermissionError):
        return _code(error) in _FORBIDDEN
    return isinstance(error, OSError) and str(error).startswith("Forbidden:")


def _loaded(scheme: str, store_class: Callable[[str], Callable[..., Any]]) -> Callable[..., Any]:
    try:
        return store_class(scheme)
    except ImportError as error:
        raise Misconfigured(
            f"{scheme} is among the allowed schemes, but its package {_PACKAGES[scheme]} cannot be loaded: "
            f"install the extra {scheme} (pip install 'edje-rerank[{scheme}]'), or remove {scheme} from the schemes"
        ) from error

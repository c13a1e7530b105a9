"""Reads images over http and https from addresses that strangers wrote.

Not fsspec's HTTP filesystem: that follows redirects on its own, connects wherever a name leads and reads a whole body
before anybody can object. Here every hop is judged, and every IP address at the moment a socket is opened to it, so
that no name can lead elsewhere between the check and its use.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver
from fsspec.asyn import get_loop
from yarl import URL

from workers.errors import Poison, Transient
from workers.ingest.address_policy import AddressPolicy

_HEADERS = {
    "Accept": "image/*",
    # Images are compressed already; an encoding on top could only be a bomb.
    "Accept-Encoding": "identity",
    "User-Agent": "edje-ingest",
}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Besides 5xx: the server asks for another try (request timeout, too early, too many requests).
_TRY_AGAIN = frozenset({408, 425, 429})
_READ_BYTES = 65_536
_SHOWN_PATH_CHARS = 200
#: An address in this alphabet is sent as it is written: re-quoting could break a signature in its query.
_ENCODED = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one fetch; the time covers names, connecting, all redirects and the body."""

    max_bytes: int
    max_redirects: int
    timeout_s: float


class HttpReader:
    """Reads one address at a time for each calling thread, over shared connections.

    The connections live on the loop thread that fsspec keeps for its object stores. Proxies, cookies and credentials
    of the environment are not used.
    """

    def __init__(self, policy: AddressPolicy, limits: FetchLimits, resolver: AbstractResolver | None = None) -> None:
        self._policy = policy
        self._limits = limits
        self._loop = get_loop()
        self._session = asyncio.run_coroutine_threadsafe(self._open(resolver), self._loop).result()

    def read(self, uri: str) -> bytes:
        """The body behind an address; raises `Poison` or `Transient`, with words that hold no secret."""
        return asyncio.run_coroutine_threadsafe(self._read(uri), self._loop).result()

    def close(self) -> None:
        """Cut all connections; whoever reads one meanwhile gets `Transient`."""
        asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result()

    async def _open(self, resolver: AbstractResolver | None) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=resolver or aiohttp.ThreadedResolver(),
            use_dns_cache=False,
            socket_factory=self._checked_socket,
            happy_eyeballs_delay=None,  # addresses in turn: a refused one must end the fetch, not lose a race
        )
        return aiohttp.ClientSession(
            connector=connector,
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # `_read` keeps the time
        )

    def _checked_socket(self, info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        family, kind, protocol, _, address = info
        self._policy.check_address(str(address[0]))
        return socket.socket(family, kind, protocol)

    async def _read(self, uri: str) -> bytes:
        url = _parsed(uri)
        with _translated_errors(url):
            async with asyncio.timeout(self._limits.timeout_s):
                for _ in range(self._limits.max_redirects + 1):
                    self._check(url)
                    async with self._session.get(url, allow_redirects=False) as response:
                        if response.status not in _REDIRECTS:
                            return await self._body(response)
                        url = _redirected(url, response.headers.get("Location"))
        raise Poison("http_refused", f"{shown(url)}: more than {self._limits.max_redirects} redirects")

    def _check(self, url: URL) -> None:
        if url.scheme not in ("http", "https") or url.raw_host is None or url.port is None:
            raise Poison("uri_invalid", f"{shown(url)}: not an http address with a host")
        if url.raw_user is not None or url.raw_password is not None:
            raise Poison("uri_not_allowed", f"{shown(url)}: a name or password in an address is not taken")
        self._policy.check_scheme(url.scheme)
        self._policy.check_host(url.raw_host)
        self._policy.check_port(url.port)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        _check_status(response)
        limit = self._limits.max_bytes
        body = bytearray()
        too_large = (response.content_length or 0) > limit
        while not too_large and (chunk := await response.content.read(_READ_BYTES)):
            body += chunk
            too_large = len(body) > limit  # counted, for the header may be missing or lie
        if too_large:
            raise Poison("image_too_large", f"{shown(response.url)}: more than {limit} bytes")
        return bytes(body)


def shown(url: URL) -> str:
    """An address for logs and dead letters: without name, password, query (a signature, often) and fragment."""
    return f"{url.scheme}://{url.raw_host}{url.raw_path[:_SHOWN_PATH_CHARS]}"


def _parsed(uri: str) -> URL:
    try:
        url = URL(uri, encoded=_ENCODED.fullmatch(uri) is not None)
        url.port  # noqa: B018  # parsed on first use
    except ValueError:
        # Its message would quote the address.
        raise Poison("uri_invalid", "the image address cannot be parsed") from None
    return url


def _redirected(url: URL, location: str | None) -> URL:
    if not location:
        raise Poison("http_refused", f"{shown(url)}: a redirect to nowhere")
    return url.join(_parsed(location))


def _check_status(response: aiohttp.ClientResponse) -> None:
    status, where = response.status, shown(response.url)
    if status == 200:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Poison("http_refused", f"{where}: the body is compressed though this was not asked for")
    elif status >= 500 or status in _TRY_AGAIN:
        raise Transient(f"{where}: HTTP status {status}")
    elif status in (404, 410):
        raise Poison("image_not_found", f"{where}: HTTP status {status}")
    elif status in (401, 403):
        raise Poison("image_forbidden", f"{where}: HTTP status {status}")
    else:
        raise Poison("http_refused", f"{where}: HTTP status {status}")


@contextmanager
def _translated_errors(url: URL) -> Iterator[None]:
    """What the client raises, as the remedy it needs; its own messages may quote the address and are left out."""
    where = shown(url)
    try:
        yield
    except TimeoutError:
        raise Transient(f"{where}: no answer in time") from None
    except aiohttp.InvalidURL:
        raise Poison("uri_invalid", f"{where}: not an address that can be fetched") from None
    except aiohttp.ClientConnectorCertificateError:
        raise Poison("http_refused", f"{where}: its certificate is not trusted") from None
    except aiohttp.ClientConnectorDNSError as error:
        if error.os_error.errno in _NO_SUCH_NAME:
            raise Poison("image_not_found", f"{where}: no host has this name") from None
        raise Transient(f"{where}: its name cannot be looked up now") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Transient(f"{where}: {type(error).__name__}") from None

"""Reads images over http and https from untrusted addresses.

Checks every redirect, and every IP address when its socket is opened, so a name cannot resolve to another address
between check and use. fsspec's HTTP filesystem does neither, and reads a whole body before it knows the size.
"""

from __future__ import annotations

import re
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from workers.errors import Poison, Transient
from workers.ingest.address_policy import AddressPolicy
from workers.ingest.addresses import parse_url, shown
from workers.ingest.scheduling import Unavailable

_HEADERS = {
    "Accept": "image/*",
    # Images are compressed already, so a content encoding saves nothing.
    "Accept-Encoding": "identity",
    "User-Agent": "edje-ingest",
}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Statuses to retry in addition to 5xx: request timeout, too early, too many requests.
_TRY_AGAIN = frozenset({408, 425, 429})
_READ_BYTES = 65_536
_NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
#: How long an unknown host name is retried: a new name is known within seconds, a misspelt name never.
_NAME_PATIENCE_S = 30.0

_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})
_UNREADABLE = frozenset({"br", "zstd", "compress", "x-compress", "dcb", "dcz"})
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0")
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
#: Compressed bytes that are given to zlib at a time.
_INFLATE_BYTES = 16_384
#: Each member costs time, also an empty one of 20 bytes; tools write one for each 64 KB.
_MAX_GZIP_MEMBERS = 10_000


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Bounds of one fetch; the time covers name lookup, connecting, all redirects and the body."""

    max_bytes: int
    max_redirects: int
    timeout_s: float


class HttpReader:
    """Reads addresses over shared connections, on the running event loop.

    Proxies, cookies and credentials of the environment are not used.
    """

    def __init__(self, policy: AddressPolicy, limits: FetchLimits, resolver: AbstractResolver | None = None) -> None:
        """Must be called on the event loop."""
        self._policy = policy
        self._limits = limits
        connector = aiohttp.TCPConnector(
            resolver=resolver or aiohttp.ThreadedResolver(),
            limit=0,  # the caller limits the fetches
            use_dns_cache=False,
            socket_factory=self._checked_socket,
            happy_eyeballs_delay=None,  # one address after the other, so that a forbidden one ends the fetch
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # the caller limits the time
        )

    async def read(self, url: URL) -> bytes:
        """Return the body at an address. Raises `Poison` or `Transient`; no message shows a secret."""
        start = url
        for _ in range(self._limits.max_redirects + 1):
            self._check(url)
            with _translated_errors(url):
                async with self._session.get(url, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        return await self._body(response)
                    location = response.headers.get("Location")
            url = _redirected(url, location)
        raise Poison("http_refused", f"{shown(start)}: more than {self._limits.max_redirects} redirects")

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    def _checked_socket(self, info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        family, kind, protocol, _, address = info
        self._policy.check_address(str(address[0]))
        return socket.socket(family, kind, protocol)

    def _check(self, url: URL) -> None:
        self._policy.check_scheme(url.scheme)
        self._policy.check_host(url.raw_host or "")
        self._policy.check_port(url.port or 0)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        _check_status(response)
        where, limit = shown(response.url), self._limits.max_bytes
        body = bytearray()
        too_large = (response.content_length or 0) > limit
        while not too_large and (chunk := await response.content.read(_READ_BYTES)):
            body += chunk
            too_large = len(body) > limit  # counted, because the header may be missing or wrong
        if too_large:
            raise Poison("image_too_large", f"{where}: more than {limit} bytes")
        return decoded_body(bytes(body), response.headers.getall("Content-Encoding", []), limit, where)


def decoded_body(body: bytes, content_encodings: list[str], limit: int, where: str) -> bytes:
    """Return a body without its content encodings. Raises `Poison` if it cannot be read or exceeds `limit` bytes.

    Many servers send a plain image with a wrong or meaningless encoding, so the body is kept unchanged if its first
    bytes are those of an image.
    """
    for encoding in reversed(",".join(content_encodings).lower().split(",")):
        name = encoding.strip()
        if body.startswith(_IMAGE_STARTS):
            return body
        if name in _UNREADABLE:
            raise Poison("http_refused", f"{where}: the body is compressed with {name}, which was not requested")
        if name in _COMPRESSED:
            # As in browsers: some servers send a deflate body without the header and the checksum of zlib.
            is_raw = name == "deflate" and not _has_zlib_header(body)
            body = _decompressed(body, -zlib.MAX_WBITS if is_raw else _GZIP_OR_ZLIB, limit, where)
    return body


def _has_zlib_header(body: bytes) -> bool:
    """Whether a body begins like zlib's format (RFC 1950) or gzip's."""
    head = int.from_bytes(body[:2])
    return head == 0x1F8B or (head >> 8 & 0x0F == zlib.DEFLATED and head % 31 == 0)


def _decompressed(body: bytes, window_bits: int, limit: int, where: str) -> bytes:
    found = bytearray()
    decompressor, num_members = zlib.decompressobj(window_bits), 1
    try:
        for start in range(0, len(body), _INFLATE_BYTES):  # zlib copies what follows a member, so a part at a time
            part = body[start : start + _INFLATE_BYTES]
            while part:
                if decompressor.eof:  # a gzip file may have several members
                    decompressor, num_members = zlib.decompressobj(window_bits), num_members + 1
                    if num_members > _MAX_GZIP_MEMBERS:
                        raise zlib.error(f"it has more than {_MAX_GZIP_MEMBERS} members")
                found += decompressor.decompress(part, limit + 1 - len(found))
                if len(found) > limit:
                    raise Poison("image_too_large", f"{where}: more than {limit} bytes after decompression")
                part = decompressor.unused_data
        if body and not decompressor.eof:
            raise zlib.error("it ends too early")
    except zlib.error as error:
        raise Poison("http_refused", f"{where}: the compressed body is broken: {error}") from None
    return bytes(found)


def retry_after_s(header: str | None, now: float) -> float | None:
    """Return the pause that a `Retry-After` header asks for: seconds, or a date. None without a valid header."""
    if header is None:
        return None
    text = header.strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _redirected(url: URL, location: str | None) -> URL:
    if not location:
        raise Poison("http_refused", f"{shown(url)}: a redirect without an address")
    try:
        return parse_url(str(url.join(URL(location))))
    except (Poison, ValueError) as error:
        if isinstance(error, Poison) and error.code == "uri_not_allowed":
            raise
        raise Poison("http_refused", f"{shown(url)}: a redirect to an invalid address") from None


def _check_status(response: aiohttp.ClientResponse) -> None:
    status, where = response.status, shown(response.url)
    if status == 200:
        return
    sentence = f"{where}: HTTP status {status}"
    if status >= 500 or status in _TRY_AGAIN:
        raise Unavailable(sentence, retry_after_s=retry_after_s(response.headers.get("Retry-After"), time.time()))
    if status in (404, 410):
        raise Poison("image_not_found", sentence)
    if status in (401, 403):
        raise Poison("image_forbidden", sentence)
    raise Poison("http_refused", sentence)


@contextmanager
def _translated_errors(url: URL) -> Iterator[None]:
    """Raise the client's errors as the worker's, without the client's messages, which may quote the address."""
    where = shown(url)
    try:
        yield
    except TimeoutError:
        raise
    except (aiohttp.InvalidURL, UnicodeError):
        raise Poison("uri_invalid", f"{where}: not an address that can be fetched") from None
    except aiohttp.ClientConnectorCertificateError:
        raise Poison("http_refused", f"{where}: the server's certificate is not trusted") from None
    except aiohttp.ClientConnectorDNSError as error:
        if error.os_error.errno in _NO_SUCH_NAME:
            raise Unavailable(f"{where}: unknown host name", give_up_after_s=_NAME_PATIENCE_S) from None
        raise Transient(f"{where}: the host name cannot be looked up now") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Transient(f"{where}: {type(error).__name__}") from None

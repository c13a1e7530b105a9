"""Parses image addresses: `file`, `http`, `https`, `s3` and `gs`.

Pure. Names the host of an address, so that no host takes more than its share of the fetches. `address_policy` decides
whether an address may be read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.parse import unquote

from yarl import URL

from workers.errors import Poison
from workers.ingest.address_policy import OBJECT_SCHEMES

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_SPACE = re.compile(r"\s")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: An address of only these characters is sent unchanged, because re-quoting could break a signature in its query.
_ENCODED = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_MAX_HOST_CHARS = 253
_SHOWN_PATH_CHARS = 200


@dataclass(frozen=True, slots=True)
class ImageAddress:
    """A parsed address.

    `host` names the server that delivers the image: scheme, host and port, or the bucket; all files are one host.
    `url` is set for http and https, `path` for a file (a path) and an object (bucket and key).
    """

    scheme: str
    host: str
    url: URL | None = None
    path: str = ""


def parse_address(uri: str) -> ImageAddress:
    """Parse an address. Raises `Poison` (`uri_invalid`, `uri_not_allowed`) with a sentence that shows no secret."""
    text = uri.strip()
    if text[:5].lower() == "data:":
        raise _invalid("a data: address is not fetched; put its base64 text into the event's field `data`")
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or not scheme.isascii() or _CONTROL.search(text):
        raise _invalid("the image address is not of the form scheme://...")
    if scheme in ("http", "https"):
        url = parse_url(text)
        return ImageAddress(scheme, f"{scheme}://{url.raw_host}:{url.port}".lower(), url=url)
    if scheme in OBJECT_SCHEMES:
        bucket, _, key = rest.partition("/")
        if not _BUCKET.fullmatch(bucket) or not key:
            raise _invalid(f"an object address is {scheme}://bucket/key")
        return ImageAddress(scheme, f"{scheme}://{bucket}", path=rest)
    if scheme == "file":
        return ImageAddress(scheme, "file", path=_file_path(rest))
    raise Poison("uri_not_allowed", f"the image address may not be read: unknown scheme {scheme[:20]!r}")


def parse_url(text: str) -> URL:
    """Parse an http address. Raises `Poison`; the messages of the parser would quote the address."""
    try:
        url = URL(text, encoded=_ENCODED.fullmatch(text) is not None)
        host, port = url.raw_host, url.port
    except ValueError:  # UnicodeError of a host name included
        raise _invalid("the image address cannot be parsed") from None
    if url.scheme not in ("http", "https") or not host or not port:
        raise _invalid("the image address is not an http address with a host and a valid port")
    if not _is_host(host) or _SPACE.search(text.split("/", 3)[2]):
        raise _invalid("the image address has an invalid host name")
    if url.raw_user is not None or url.raw_password is not None:
        raise Poison("uri_not_allowed", f"{shown(url)}: a user name or password in an address is not accepted")
    return url


def _is_host(host: str) -> bool:
    if ":" in host:  # a literal IPv6 address, possibly with a zone
        try:
            IPv6Address(host)
        except ValueError:
            return False
        return True
    name = host.removesuffix(".").lower()
    return len(name) <= _MAX_HOST_CHARS and all(_LABEL.fullmatch(label) for label in name.split("."))


def shown(url: URL) -> str:
    """Return an address for logs and dead letters: without user, password, query (often a signature) and fragment."""
    return f"{url.scheme}://{url.raw_host}{url.raw_path[:_SHOWN_PATH_CHARS]}"


def _file_path(rest: str) -> str:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash or "?" in path or "#" in path:
        raise _invalid("a file address is file:///path, with ? and # in the path as %3F and %23")
    try:
        written = unquote(slash + path, errors="strict")
    except UnicodeDecodeError:
        raise _invalid("the path of the file address is not UTF-8") from None
    if _CONTROL.search(written):
        raise _invalid("the path of the file address contains control characters")
    return written


def _invalid(sentence: str) -> Poison:
    return Poison("uri_invalid", sentence)

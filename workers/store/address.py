"""Reads the address of a token store: one server, a Sentinel group or a cluster, and hides its secrets.

    redis://[user:password@]host:port/db            one server; `rediss://` with TLS, `unix:///path` by socket
    redis+sentinel://host:port,host:port/service/db whichever server the sentinels call the master
    redis+cluster://host:port,host:port             a cluster, found through any of these nodes

`rediss+sentinel` and `rediss+cluster` add TLS. Options of the client follow as a query (`?ssl_ca_certs=/ca.pem`);
`sentinel_username` and `sentinel_password` are for the sentinels themselves. Knows no Redis client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from workers.errors import Misconfigured
from workers.secrets import mask_addresses

StoreKind = Literal["server", "sentinel", "cluster"]

_KINDS: dict[str, tuple[StoreKind, str]] = {
    "redis": ("server", "redis"),
    "rediss": ("server", "rediss"),
    "unix": ("server", "unix"),
    "redis+sentinel": ("sentinel", "redis"),
    "rediss+sentinel": ("sentinel", "rediss"),
    "redis+cluster": ("cluster", "redis"),
    "rediss+cluster": ("cluster", "rediss"),
}
_DEFAULT_PORTS: dict[StoreKind, int] = {"server": 6379, "sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A store address, taken apart as far as the client's own URL parser does not do it."""

    kind: StoreKind
    nodes: tuple[tuple[str, int], ...]  # of a Sentinel group or a cluster
    client_url: str  # what the client's own parser reads: scheme, credentials, first node, database, options
    service: str | None  # what the sentinels call the master

    @classmethod
    def parse(cls, url: str) -> StoreUrl:
        """Take an address apart. Raises `Misconfigured` with a sentence that shows no secret."""
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise Misconfigured(f"{mask_addresses(url)} is not an address: {error}") from None
        if parts.scheme not in _KINDS:
            raise Misconfigured(f"REDIS_URL starts with {parts.scheme!r}; it must be one of {', '.join(_KINDS)}")
        kind, scheme = _KINDS[parts.scheme]
        if kind == "server":
            _check_port(parts, url)
            if scheme != "unix":
                _check_database(parts.path, url)
            return cls(kind, (), url, None)
        userinfo, at, hosts = parts.netloc.rpartition("@")
        nodes = tuple(_node(host, kind, url) for host in hosts.split(","))
        service, database = None, parts.path
        if kind == "sentinel":
            name, _, number = parts.path.lstrip("/").partition("/")
            if not name:
                raise Misconfigured(f"{mask_addresses(url)} names no service: redis+sentinel://host:port/service/db")
            _check_database(number, url)
            service, database = unquote(name), f"/{number}"
        elif parts.path.strip("/"):
            raise Misconfigured(f"{mask_addresses(url)} names a database, which a cluster does not have")
        host, port = nodes[0]
        bracketed = f"[{host}]" if ":" in host else host
        first = parts._replace(scheme=scheme, netloc=f"{userinfo}{at}{bracketed}:{port}", path=database)
        return cls(kind, nodes, first.geturl(), service)


def _node(text: str, kind: StoreKind, url: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    _check_port(parts, url)
    if not parts.hostname:
        raise Misconfigured(f"{mask_addresses(url)} has a node without a host name")
    return parts.hostname, parts.port or _DEFAULT_PORTS[kind]


def _check_database(path: str, url: str) -> None:
    # redis-py would take number 0 for one that it cannot read.
    if path.strip("/") and not path.strip("/").isdecimal():
        raise Misconfigured(f"{mask_addresses(url)} names a database that is not a number")


def _check_port(parts: SplitResult, url: str) -> None:
    try:
        _ = parts.port
    except ValueError:
        # Python's own message would show a part of a password that holds an unescaped slash.
        sentence = "has a port that is none; is a / or @ of the password written as %2F or %40?"
        raise Misconfigured(f"{mask_addresses(url)} {sentence}") from None

"""Parses the address of a token store: one server, a Sentinel group or a cluster.

    redis://[user:password@]host:port/db            one server; `rediss://` with TLS, `unix:///path` by socket
    redis+sentinel://host:port,host:port/service/db the server that the sentinels call the master
    redis+cluster://host:port,host:port             a cluster, found through any of these nodes

`rediss+sentinel` and `rediss+cluster` add TLS. Options follow as a query (`?ssl_ca_certs=/ca.pem`): those of `_OPTIONS`
and all that begin with `ssl_`. Not parsed by `urllib`, which treats IPv6 nodes differently from one Python
release to the next. Imports no Redis client.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Literal, NoReturn
from urllib.parse import parse_qsl, unquote

from workers.errors import Misconfigured
from workers.secrets import mask_addresses

StoreKind = Literal["server", "sentinel", "cluster"]
OptionValue = str | int | float | bool

#: By scheme: the kind of store, and whether the connection uses TLS.
_SCHEMES: dict[str, tuple[StoreKind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("server", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_DEFAULT_PORTS: dict[StoreKind, int] = {"server": 6379, "sentinel": 26379, "cluster": 6379}
_MAX_PORT = 65_535
_MAX_DATABASE = 2**31 - 1
_HOST = re.compile(r"[^\s\[\]@:/?#,\\]+")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise ValueError
    return number


def _boolean(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]


#: The allowed client options, none of which changes a call's result, each with its parser.
_OPTIONS: dict[str, Callable[[str], OptionValue]] = {
    "db": int,
    "username": str,
    "password": str,
    "sentinel_username": str,
    "sentinel_password": str,
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
    "socket_keepalive": _boolean,
    "socket_read_size": _positive,
    "health_check_interval": _positive,
    "max_connections": _positive,
    "client_name": str,
    "ssl_check_hostname": _boolean,
    "ssl_validate_ocsp": _boolean,
    "ssl_validate_ocsp_stapled": _boolean,
    "ssl_min_version": int,
}
_CREDENTIALS = ("username", "password", "db", "sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A parsed store address."""

    kind: StoreKind
    has_tls: bool
    nodes: tuple[tuple[str, int], ...]  # host and port; empty for a Unix socket
    socket_path: str | None = None
    service: str | None = None  # the name of the master in Sentinel
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    options: Mapping[str, OptionValue] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str) -> StoreUrl:
        """Parse an address. Raises `Misconfigured` with a sentence that shows no secret."""
        scheme, separator, rest = url.strip().partition("://")
        if not separator or scheme.lower() not in _SCHEMES:
            shown = f" starts with {scheme!r}" if separator and len(scheme) < 20 else ""
            raise Misconfigured(f"REDIS_URL{shown}; it must start with one of {', '.join(_SCHEMES)} and ://")
        kind, has_tls = _SCHEMES[scheme.lower()]
        rest = rest.partition("#")[0]
        before_query, _, query = rest.partition("?")
        authority, slash, path = before_query.partition("/")
        userinfo, _, hosts = authority.rpartition("@")
        username, _, password = userinfo.partition(":")
        options = _parsed_options(query, has_tls=has_tls, url=url)
        given = {name: options.pop(name) for name in _CREDENTIALS if name in options}
        found: dict[str, object] = {
            "username": unquote(username) or None,
            "password": unquote(password) or None,
            **{name: value for name, value in given.items() if name != "db"},
        }
        if scheme.lower() == "unix":
            if hosts or not path:
                _refuse(url, "has no socket path; write unix:///path, with three slashes")
            socket_path = unquote(slash + path)
            database = _database(str(given.get("db", "")), url)
            return cls(kind, has_tls, (), socket_path=socket_path, database=database, options=options, **found)  # type: ignore[arg-type]
        nodes = tuple(_node(host, kind, url) for host in hosts.split(","))
        service = None
        if kind == "sentinel":
            name, _, path = path.partition("/")
            if not name:
                _refuse(url, "names no service; write redis+sentinel://host:port/service/db")
            service = unquote(name)
        elif kind == "server" and len(nodes) > 1:
            _refuse(url, "names several servers; that needs redis+sentinel:// or redis+cluster://")
        database = _database(path.strip("/") or str(given.get("db", "")), url)
        if kind == "cluster" and (path.strip("/") or "db" in given):
            _refuse(url, "names a database, which a cluster does not have")
        return cls(kind, has_tls, nodes, service=service, database=database, options=options, **found)  # type: ignore[arg-type]


def _parsed_options(query: str, *, has_tls: bool, url: str) -> dict[str, OptionValue]:
    options: dict[str, OptionValue] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if not re.fullmatch(r"\w{1,40}", name):
            _refuse(url, "has an invalid option; is a ? or & of the password written as %3F or %26?")
        if name not in _OPTIONS and not name.startswith("ssl_"):
            _refuse(url, f"has the option {name!r}; a token store takes {', '.join(sorted(_OPTIONS))} and ssl_...")
        if name.startswith("ssl_") and not has_tls:
            _refuse(url, f"has the option {name!r} without TLS; that needs rediss://")
        try:
            options[name] = _OPTIONS.get(name, str)(text)
        except (ValueError, KeyError):
            _refuse(url, f"has an invalid value for the option {name!r}")
    return options


def _node(text: str, kind: StoreKind, url: str) -> tuple[str, int]:
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        try:
            IPv6Address(host)
        except ValueError:
            bracket = ""
        if not bracket or (port and not port.startswith(":")):
            _refuse(url, "has an invalid IPv6 address; it is written as [address]:port")
        port = port[1:]
    else:
        host, _, port = text.partition(":")
        if not host and kind == "server":
            host = "localhost"
        if not host:
            _refuse(url, "has a node without a host name")
        if ":" in port and not port.replace(":", "").isdecimal():
            _refuse(url, "has an invalid port, or an IPv6 address without brackets")
        if not _HOST.fullmatch(host):
            _refuse(url, "has an invalid host name")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) <= _MAX_PORT):
        # The port is not shown, because it may be a part of the password.
        _refuse(url, "has an invalid port; is a / ? # or @ of the password written as %2F, %3F, %23 or %40?")
    return host.lower(), int(port) if port else _DEFAULT_PORTS[kind]


def _database(text: str, url: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal() and int(text) <= _MAX_DATABASE):
        _refuse(url, "names a database that is not a number")
    return int(text)


def _refuse(url: str, problem: str) -> NoReturn:
    raise Misconfigured(f"REDIS_URL={mask_addresses(url)} {problem}")

"""Decides which image addresses the service may read: schemes, hosts, ports and network addresses.

Pure: it judges names and numbers and looks nothing up. That a judged name leads to the judged number is the business
of whoever connects.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path

from workers.errors import Misconfigured, Poison

SCHEMES = frozenset({"file", "http", "https", "s3", "gs"})

#: What may be routed on the public internet at all (RFC 4291); everything else in IPv6 is special.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
#: The well-known prefix under which a NAT64 gateway reaches an IPv4 address (RFC 6052): the last 32 bits.
_NAT64 = IPv6Network("64:ff9b::/96")
#: Protocol assignments: not for images whatever their `is_global` says, which differs between Python versions.
_PROTOCOL_ASSIGNMENTS = IPv4Network("192.0.0.0/24")
#: Public by number, yet on every virtual machine of Azure it is the machine's own control service.
_AZURE_PLATFORM = IPv4Address("168.63.129.16")


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """What may be read.

    `hosts` holds names and patterns like `*.example.com` (which is not `example.com` itself), and for s3 and gs
    bucket names; empty allows every one. `ports` empty allows every port. `file_roots` empty allows no file.
    """

    schemes: frozenset[str]
    hosts: tuple[str, ...]
    ports: frozenset[int]
    file_roots: tuple[Path, ...]
    allow_private_addresses: bool

    def __post_init__(self) -> None:
        if unknown := sorted(self.schemes - SCHEMES):
            raise Misconfigured(f"no such scheme of image addresses: {', '.join(unknown)}; known: {sorted(SCHEMES)}")
        for pattern in self.hosts:
            if "*" in pattern.removeprefix("*.") or not pattern.removeprefix("*."):
                raise Misconfigured(f"{pattern!r} is no host: a name like example.com or a pattern like *.example.com")

    def check_scheme(self, scheme: str) -> None:
        """Raise `Poison` unless addresses of this scheme may be read."""
        if scheme not in self.schemes:
            raise _refused(f"the scheme {scheme[:20]!r} is not allowed")

    def check_host(self, host: str) -> None:
        """Raise `Poison` unless this host (or bucket) may be read, or is an address that may not."""
        name = _normal(host)
        if self.hosts and not any(_matches(name, pattern) for pattern in self.hosts):
            raise _refused(f"the host {host[:253]!r} is not allowed")
        try:
            ip_address(name)
        except ValueError:
            return
        self.check_address(name)

    def check_port(self, port: int) -> None:
        """Raise `Poison` unless this port may be connected to."""
        if self.ports and port not in self.ports:
            raise _refused(f"the port {port} is not allowed")

    def check_address(self, address: str) -> None:
        """Raise `Poison` unless this IP address may be connected to."""
        number = ip_address(address)
        allowed = _is_unicast(number) if self.allow_private_addresses else _is_public(number)
        if not allowed:
            raise _refused(f"the address {address} is not a public one")


def _refused(reason: str) -> Poison:
    return Poison("uri_not_allowed", f"the image address may not be read: {reason}")


def _normal(host: str) -> str:
    return host.rstrip(".").lower()


def _matches(name: str, pattern: str) -> bool:
    pattern = _normal(pattern)
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


def _is_unicast(number: IPv4Address | IPv6Address) -> bool:
    return not (number.is_multicast or number.is_unspecified)


def _is_public(number: IPv4Address | IPv6Address) -> bool:
    if isinstance(number, IPv4Address):
        return (
            number.is_global  # excludes private, shared (100.64/10), loopback, link-local, documentation, ...
            and not (number.is_multicast or number.is_reserved)
            and number not in _PROTOCOL_ASSIGNMENTS
            and number != _AZURE_PLATFORM
        )
    inner = _inner(number)
    if inner is not None:
        return _is_public(inner)
    return number in _GLOBAL_UNICAST and number.is_global and not number.is_multicast


def _inner(number: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for."""
    if number.ipv4_mapped is not None:
        return number.ipv4_mapped
    if number.sixtofour is not None:
        return number.sixtofour
    return IPv4Address(int(number) & 0xFFFF_FFFF) if number in _NAT64 else None

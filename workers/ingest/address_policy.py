"""Decides which image addresses the service may read: schemes, hosts, buckets, ports and network addresses.

Pure: it checks names and numbers without any lookup. The fetcher checks every IP address again when it opens a
connection to it. The networks are listed here, because the lists of Python's `ipaddress` differ between releases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path

from workers.errors import Misconfigured, Poison

SCHEMES = frozenset({"file", "http", "https", "s3", "gs"})
OBJECT_SCHEMES = frozenset({"s3", "gs"})

#: IPv4 networks that are not public (IANA's special-purpose registry), except those in the next two lists.
_PRIVATE_V4 = tuple(
    map(
        IPv4Network,
        (
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
        ),
    )
)
#: IPv4 networks whose addresses belong to no single machine.
_NO_MACHINE_V4 = tuple(map(IPv4Network, ("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4")))
#: Link-local networks, and other addresses under which clouds serve credentials to their virtual machines.
_METADATA_V4 = tuple(
    map(
        IPv4Network,
        (
            "169.254.0.0/16",  # almost every cloud: 169.254.169.254 and nearby addresses
            "100.100.100.200/32",  # Alibaba Cloud
            "168.63.129.16/32",  # Azure's platform service
            "192.0.0.192/32",  # Oracle Cloud
        ),
    )
)
_METADATA_V6 = tuple(
    map(
        IPv6Network,
        (
            "fe80::/10",  # link-local
            "fd00:ec2::/32",  # AWS
            "fd20:ce::/32",  # Google Cloud
            "fd00:42::/32",  # Scaleway
        ),
    )
)
_METADATA_NAMES = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "metadata.azure.internal", "instance-data"}
)

#: The only network of IPv6 that is routed on the public internet (RFC 4291).
_GLOBAL_UNICAST = IPv6Network("2000::/3")
#: Parts of that network that are not public: protocol assignments (such as Teredo) and documentation.
_PRIVATE_V6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
_NO_MACHINE_V6 = tuple(map(IPv6Network, ("::/128", "ff00::/8")))

#: Networks of IPv6 addresses that contain an IPv4 address, with the number of bits after it.
_EMBEDDED_V4 = (
    (IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (IPv6Network("::ffff:0:0:0/96"), 0),  # translated (RFC 6145)
    (IPv6Network("::/96"), 0),  # compatible, long deprecated
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64, the well-known prefix (RFC 6052)
    (IPv6Network("64:ff9b:1::/48"), 0),  # NAT64, local prefixes
    (IPv6Network("2002::/16"), 80),  # 6to4
)
#: Those of these networks that lead to the contained address on the public internet.
_TRANSPARENT = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"), IPv6Network("2002::/16"))
_TEREDO = IPv6Network("2001::/32")
_ISATAP = 0x5EFE  # the second word of an interface identifier whose last 32 bits are an IPv4 address
_LAST_32_BITS = 0xFFFF_FFFF

_AnyAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """The rules for image addresses.

    `hosts` holds names and patterns like `*.example.com` (which does not match `example.com`), and the buckets
    of s3 and gs; if empty, every host and no bucket is allowed. Empty `ports` allow every port, empty `file_roots` no
    file. Addresses that serve a machine's credentials are never allowed, even with `allow_private_addresses`.
    """

    schemes: frozenset[str]
    hosts: tuple[str, ...]
    ports: frozenset[int]
    file_roots: tuple[Path, ...]
    allow_private_addresses: bool

    def __post_init__(self) -> None:
        if unknown := sorted(self.schemes - SCHEMES):
            raise Misconfigured(f"unknown schemes of image addresses: {', '.join(unknown)}; known: {sorted(SCHEMES)}")
        for pattern in self.hosts:
            if "*" in pattern.removeprefix("*.") or not pattern.removeprefix("*."):
                raise Misconfigured(
                    f"{pattern!r} is not a host: write a name like example.com or a pattern like *.example.com"
                )
        if (stores := sorted(self.schemes & OBJECT_SCHEMES)) and not self.hosts:
            raise Misconfigured(
                f"{' and '.join(stores)} among the allowed schemes need the names of their buckets among the allowed "
                "hosts: without them any producer could read every bucket that this worker's credentials open"
            )

    def check_scheme(self, scheme: str) -> None:
        """Raise `Poison` unless addresses of this scheme may be read."""
        if scheme not in self.schemes:
            raise _refused(f"the scheme {scheme[:20]!r} is not allowed; allowed: {', '.join(sorted(self.schemes))}")

    def check_host(self, host: str) -> None:
        """Raise `Poison` unless this host may be read; a literal IP address is checked as an address too."""
        name = _normal(host)
        if self.hosts and not any(_matches(name, pattern) for pattern in self.hosts):
            raise _refused(f"the host {host[:253]!r} is not allowed")
        if name in _METADATA_NAMES or name.startswith("instance-data."):
            raise _refused(f"the host {host[:253]!r} serves the machine's credentials")
        try:
            ip_address(name)
        except ValueError:
            return
        self.check_address(name)

    def check_bucket(self, bucket: str) -> None:
        """Raise `Poison` unless this bucket may be read."""
        if not any(_matches(_normal(bucket), pattern) for pattern in self.hosts):
            raise _refused(f"the bucket {bucket[:253]!r} is not allowed")

    def check_port(self, port: int) -> None:
        """Raise `Poison` unless this port may be connected to."""
        if self.ports and port not in self.ports:
            raise _refused(f"the port {port} is not allowed")

    def check_address(self, address: str) -> None:
        """Raise `Poison` unless this IP address may be connected to."""
        number = ip_address(address)
        if is_metadata(number):
            raise _refused(f"the address {address} is link-local or serves the machine's credentials")
        if _names_no_machine(number):
            raise _refused(f"the address {address} belongs to no single machine")
        if not self.allow_private_addresses and not is_public(number):
            raise _refused(f"the address {address} is not public")


def is_public(number: _AnyAddress) -> bool:
    """Whether an address may belong to a machine on the public internet."""
    if isinstance(number, IPv4Address):
        return not _in_any(number, (*_PRIVATE_V4, *_NO_MACHINE_V4, *_METADATA_V4))
    for network, num_bits in _EMBEDDED_V4:
        if number in network:
            return network in _TRANSPARENT and is_public(_embedded(number, num_bits))
    return number in _GLOBAL_UNICAST and not _in_any(number, _PRIVATE_V6) and not is_metadata(number)


def is_metadata(number: _AnyAddress) -> bool:
    """Whether an address is link-local or serves a machine's credentials, also in an IPv6 form of an IPv4 address."""
    if isinstance(number, IPv4Address):
        return _in_any(number, _METADATA_V4)
    return _in_any(number, _METADATA_V6) or any(_in_any(inner, _METADATA_V4) for inner in _embedded_addresses(number))


def _names_no_machine(number: _AnyAddress) -> bool:
    if isinstance(number, IPv4Address):
        return _in_any(number, _NO_MACHINE_V4)
    if _in_any(number, _NO_MACHINE_V6):
        return True
    return any(number in network and _names_no_machine(_embedded(number, bits)) for network, bits in _EMBEDDED_V4[:2])


def _embedded_addresses(number: IPv6Address) -> Iterator[IPv4Address]:
    """Every IPv4 address that an IPv6 address may lead to."""
    for network, num_bits in _EMBEDDED_V4:
        if number in network:
            yield _embedded(number, num_bits)
    if number in _TEREDO:
        yield _embedded(number, 64)  # the server
        yield IPv4Address(~int(number) & _LAST_32_BITS)  # the client, inverted
    if int(number) >> 32 & 0xFFFF == _ISATAP:
        yield _embedded(number, 0)


def _embedded(number: IPv6Address, num_bits_behind: int) -> IPv4Address:
    return IPv4Address(int(number) >> num_bits_behind & _LAST_32_BITS)


def _in_any(number: _AnyAddress, networks: tuple[IPv4Network, ...] | tuple[IPv6Network, ...]) -> bool:
    return any(number in network for network in networks)


def _refused(reason: str) -> Poison:
    return Poison("uri_not_allowed", f"the image address may not be read: {reason}")


def _normal(host: str) -> str:
    return host.rstrip(".").lower()


def _matches(name: str, pattern: str) -> bool:
    pattern = _normal(pattern)
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern

"""Which addresses may be read, decided without looking anything up."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import Misconfigured, Poison
from workers.ingest.address_policy import AddressPolicy


def policy(**changes: object) -> AddressPolicy:
    fields: dict[str, object] = {
        "schemes": frozenset({"https"}),
        "hosts": (),
        "ports": frozenset({80, 443}),
        "file_roots": (),
        "allow_private_addresses": False,
    }
    return AddressPolicy(**{**fields, **changes})


PRIVATE = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.168.0.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::808:808",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:a00:1::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_refused(address):
    with pytest.raises(Poison, match="not a public one") as caught:
        policy().check_address(address)
    assert caught.value.code == "uri_not_allowed"
    with pytest.raises(Poison):
        policy().check_host(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_a_public_address_is_allowed(address):
    policy().check_address(address)
    policy().check_host(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "::1", "fe80::1", "169.254.1.1"])
def test_a_private_address_is_allowed_where_the_setting_says_so(address):
    policy(allow_private_addresses=True).check_address(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "224.0.0.1", "ff02::1"])
def test_what_names_no_single_machine_is_never_allowed(address):
    with pytest.raises(Poison):
        policy(allow_private_addresses=True).check_address(address)


@given(number=st.integers(0, 2**32 - 1))
def test_an_embedded_ipv4_address_is_judged_like_itself(number):
    plain = IPv4Address(number)
    forms = [
        IPv6Address(0xFFFF << 32 | number),
        IPv6Address(int(IPv6Address("64:ff9b::")) | number),
        IPv6Address(0x2002 << 112 | number << 80 | 1),
    ]

    def allowed(address: object) -> bool:
        try:
            policy().check_address(str(address))
        except Poison:
            return False
        return True

    assert {allowed(form) for form in forms} == {allowed(plain)}


@given(address=st.ip_addresses())
def test_nothing_the_standard_library_calls_special_is_allowed(address):
    special = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    if special or address.is_unspecified or (address.is_reserved and "64:ff9b::" not in str(address)):
        inner = getattr(address, "ipv4_mapped", None)
        if inner is None:
            with pytest.raises(Poison):
                policy().check_address(str(address))
    assert ip_address(str(address)) == address


def test_an_empty_host_list_allows_every_public_host():
    policy().check_host("anything.example")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("images.example", True),
        ("IMAGES.example", True),
        ("images.example.", True),
        ("a.cdn.example", True),
        ("a.b.cdn.example", True),
        ("cdn.example", False),
        ("evilcdn.example", False),
        ("images.example.evil.example", False),
        ("sub.images.example", False),
        ("", False),
    ],
)
def test_hosts_are_names_and_patterns_of_subdomains(host, allowed):
    listed = policy(hosts=("images.example", "*.CDN.example"))
    if allowed:
        listed.check_host(host)
    else:
        with pytest.raises(Poison, match="not allowed"):
            listed.check_host(host)


def test_a_listed_literal_address_must_still_be_public():
    with pytest.raises(Poison):
        policy(hosts=("127.0.0.1",)).check_host("127.0.0.1")


@pytest.mark.parametrize("pattern", ["*", "*.", "", "a.*.example", "*example"])
def test_a_pattern_that_means_nothing_refuses_to_start(pattern):
    with pytest.raises(Misconfigured, match="is no host"):
        policy(hosts=(pattern,))


def test_an_unknown_scheme_in_the_settings_refuses_to_start():
    with pytest.raises(Misconfigured, match="ftp"):
        policy(schemes=frozenset({"ftp", "https"}))


def test_only_listed_schemes_and_ports():
    policy().check_scheme("https")
    policy().check_port(443)
    policy(ports=frozenset()).check_port(9000)
    with pytest.raises(Poison, match="scheme"):
        policy().check_scheme("http")
    with pytest.raises(Poison, match="port"):
        policy().check_port(6379)


def test_the_policy_is_immutable():
    with pytest.raises(AttributeError):
        policy().file_roots = (Path("/"),)

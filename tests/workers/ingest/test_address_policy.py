"""The address policy: which addresses may be read, decided without a look-up."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
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
    with pytest.raises(Poison, match="may not be read: the address") as caught:
        policy().check_address(address)
    assert caught.value.code == "uri_not_allowed"
    with pytest.raises(Poison):
        policy().check_host(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.1.1.1",
        "192.31.196.1",
        "192.0.1.1",
        "2606:4700:4700::1111",
        "2001:4860:4860::8888",
        "2a00:1450:4001::1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ],
)
def test_a_public_address_is_allowed(address):
    policy().check_address(address)
    policy().check_host(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "100.64.0.1", "::1", "fc00::1", "fd12::1", "::ffff:10.0.0.1"]
)
def test_a_private_address_is_allowed_where_the_setting_permits_it(address):
    policy(allow_private_addresses=True).check_address(address)


METADATA = [
    "169.254.169.254",
    "169.254.170.2",
    "169.254.1.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "fe80::a9fe:a9fe",
    "fe80::1%eth0",
    "::ffff:169.254.169.254",
    "::ffff:0:169.254.169.254",
    "::169.254.169.254",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::169.254.169.254",
    "64:ff9b::6464:64c8",
    "2002:a9fe:a9fe::1",
    "2002:6464:64c8::",
    "2001:0:a9fe:a9fe::1",
    "2001:0:808:808:0:0:5601:5601",  # Teredo: the inverted 169.254.169.254
    "2001:4860::5efe:a9fe:a9fe",
]


@pytest.mark.parametrize("address", METADATA)
@pytest.mark.parametrize("private", [False, True])
def test_a_service_for_credentials_of_the_machine_is_never_read(address, private):
    listed = policy(allow_private_addresses=private, hosts=(address,))
    for check in (listed.check_address, listed.check_host):
        with pytest.raises(Poison) as caught:
            check(address)
        assert caught.value.code == "uri_not_allowed"


@pytest.mark.parametrize(
    "host", ["metadata.google.internal", "METADATA.google.internal.", "metadata", "instance-data.ec2.internal"]
)
def test_the_names_of_such_services_are_refused_too(host):
    with pytest.raises(Poison, match="credentials"):
        policy(allow_private_addresses=True).check_host(host)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "255.255.255.255", "ff02::1", "::ffff:224.0.0.1"]
)
def test_an_address_of_no_single_machine_is_never_allowed(address):
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


#: The special-purpose registries of IANA, and multicast; not those of Python, which differ between its releases.
SPECIAL_NETWORKS = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
]  # fmt: skip


@given(address=st.sampled_from(SPECIAL_NETWORKS).flatmap(lambda network: st.ip_addresses(network=network)))
def test_no_address_of_a_special_purpose_network_is_allowed(address):
    with pytest.raises(Poison):
        policy().check_address(str(address))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_buckets_must_be_listed(scheme):
    with pytest.raises(Misconfigured, match=f"{scheme} among the allowed schemes need the names of their buckets"):
        policy(schemes=frozenset({"https", scheme}))

    listed = policy(schemes=frozenset({"https", scheme}), hosts=("ours", "*.ours"))
    listed.check_bucket("ours")
    listed.check_bucket("eu.ours")
    with pytest.raises(Poison, match="bucket 'theirs' is not allowed"):
        listed.check_bucket("theirs")
    with pytest.raises(Poison, match="bucket"):
        policy().check_bucket("ours")


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
    with pytest.raises(Misconfigured, match="is not a host"):
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

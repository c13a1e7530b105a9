"""The address of a token store: what each form means, and that no error shows a secret."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import Misconfigured
from workers.store.address import StoreUrl


def test_an_address_of_one_server_is_parsed():
    parsed = StoreUrl.parse("rediss://u:p%40@H:7000/3?ssl_ca_certs=/ca.pem&socket_timeout=1.5")

    assert (parsed.kind, parsed.has_tls, parsed.nodes) == ("server", True, (("h", 7000),))
    assert (parsed.username, parsed.password, parsed.database) == ("u", "p@", 3)
    assert parsed.options == {"ssl_ca_certs": "/ca.pem", "socket_timeout": 1.5}


@pytest.mark.parametrize(
    "url", ["redis://", "redis:///0", "redis://localhost", "redis://:6379", "redis://localhost:/0"]
)
def test_left_out_parts_have_defaults(url):
    assert StoreUrl.parse(url) == StoreUrl("server", False, (("localhost", 6379),))


def test_credentials_and_database_may_be_options():
    parsed = StoreUrl.parse("unix:///run/redis%20a.sock?db=2&password=pw&username=u")

    assert (parsed.socket_path, parsed.nodes) == ("/run/redis a.sock", ())
    assert (parsed.username, parsed.password, parsed.database) == ("u", "pw", 2)


def test_a_sentinel_address_names_the_sentinels_the_service_and_the_database():
    parsed = StoreUrl.parse("redis+sentinel://u:p%40@a:1,b,[::1]:3,[fe80::2]/tokens/2?sentinel_password=s")

    assert parsed.kind == "sentinel"
    assert parsed.nodes == (("a", 1), ("b", 26379), ("::1", 3), ("fe80::2", 26379))
    assert (parsed.service, parsed.database) == ("tokens", 2)
    assert (parsed.password, parsed.sentinel_password) == ("p@", "s")


def test_a_cluster_address_names_any_of_its_nodes():
    parsed = StoreUrl.parse("rediss+cluster://a:7000,b")

    assert (parsed.kind, parsed.has_tls, parsed.nodes) == ("cluster", True, (("a", 7000), ("b", 6379)))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://u:s3cret@h", "must start with one of"),
        ("localhost:6379", "must start with one of"),
        ("", "must start with one of"),
        ("redis://u:s3cret@h:port/0", "invalid port"),
        ("redis://u:s3cret@h:0/0", "invalid port"),
        ("redis://u:s3cret@h:٣/0", "invalid port"),
        ("redis://u:s3cret/x@h:6379/0", "%2F"),
        ("redis://u:half?s3cret@h:6379/0", "%3F"),
        ("redis://u:s3cret@h:6379/tokens", "database"),
        ("redis://u:s3cret@h:6379/-1", "database"),
        ("redis://u:s3cret@a,b/0", "several servers"),
        ("redis://u:s3cret@::1:6379/0", "host|port"),
        ("redis://u:s3cret@[::1/0", "IPv6"),
        ("redis://u:s3cret@[::g]:1/0", "IPv6"),
        ("redis://u:s3cret@[::1]6379/0", "IPv6"),
        ("redis://u:s3cret@h ost/0", "host name"),
        ("unix://u:s3cret@host/path", "three slashes"),
        ("unix://", "three slashes"),
        ("redis+sentinel://u:s3cret@h:1", "names no service"),
        ("redis+sentinel://u:s3cret@h:1/tokens/x", "database"),
        ("redis+sentinel://u:s3cret@h:1,/tokens", "without a host"),
        ("redis+cluster://u:s3cret@h:1/1", "cluster does not have"),
        ("redis+cluster://u:s3cret@h:99999", "port"),
        ("redis://u:s3cret@h?decode_responses=True", "'decode_responses'.*takes"),
        ("redis://u:s3cret@h?protocol=3", "'protocol'"),
        ("redis://u:s3cret@h?encoding=latin-1", "'encoding'"),
        ("redis://u:s3cret@h?socket_timeout=soon", "invalid value for the option 'socket_timeout'"),
        ("redis://u:s3cret@h?socket_timeout=0", "invalid value"),
        ("redis://u:s3cret@h?socket_timeout=nan", "invalid value"),
        ("redis://u:s3cret@h?max_connections=-1", "invalid value"),
        ("redis://u:s3cret@h?ssl_ca_certs=/ca.pem", "rediss://"),
    ],
)
def test_a_wrong_address_is_refused_with_a_sentence_that_shows_no_secret(url, sentence):
    with pytest.raises(Misconfigured, match=sentence) as refused:
        StoreUrl.parse(url)

    assert "s3cret" not in str(refused.value)


@given(st.text(max_size=60), st.sampled_from(["redis", "rediss", "unix", "redis+sentinel", "redis+cluster"]))
def test_any_text_is_an_address_or_a_sentence(text, scheme):
    for url in (text, f"{scheme}://{text}"):
        with contextlib.suppress(Misconfigured):
            StoreUrl.parse(url)


def test_no_password_is_shown_by_a_parsed_address():
    assert "s3cret" not in repr(StoreUrl.parse("redis+sentinel://u:s3cret@h/t?sentinel_password=s3cret2"))

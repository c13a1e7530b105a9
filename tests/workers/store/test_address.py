"""The address of a token store: what each form means, and that no secret comes out."""

import pytest

from workers.errors import Misconfigured
from workers.store.address import StoreUrl


@pytest.mark.parametrize("url", ["redis://h:6379/3", "rediss://u:p@h/0?ssl_ca_certs=/ca.pem", "unix:///run/redis.sock"])
def test_one_server_is_left_to_the_clients_own_parser(url):
    assert StoreUrl.parse(url) == StoreUrl("server", (), url, None)


def test_a_sentinel_address_names_the_sentinels_the_service_and_the_database():
    parsed = StoreUrl.parse("redis+sentinel://u:p%40@a:1,b,[::1]:3/tokens/2?socket_timeout=1")

    assert parsed.kind == "sentinel"
    assert parsed.nodes == (("a", 1), ("b", 26379), ("::1", 3))
    assert parsed.service == "tokens"
    assert parsed.client_url == "redis://u:p%40@a:1/2?socket_timeout=1"


def test_a_cluster_address_names_any_of_its_nodes():
    parsed = StoreUrl.parse("rediss+cluster://a:7000,b")

    assert (parsed.kind, parsed.nodes) == ("cluster", (("a", 7000), ("b", 6379)))
    assert parsed.client_url == "rediss://a:7000"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://u:s3cret@h", "must be one of"),
        ("localhost:6379", "must be one of"),
        ("redis://u:s3cret@h:port/0", "port"),
        ("redis://u:s3cret/x@h:6379/0", "%2F"),
        ("redis://u:s3cret@h:6379/tokens", "database"),
        ("redis+sentinel://u:s3cret@h:1", "names no service"),
        ("redis+sentinel://u:s3cret@h:1/tokens/x", "database"),
        ("redis+sentinel://u:s3cret@h:1,/tokens", "without a host"),
        ("redis+cluster://u:s3cret@h:1/1", "cluster does not have"),
        ("redis+cluster://u:s3cret@h:99999", "port"),
        ("redis://[::1", "not an address"),
    ],
)
def test_a_wrong_address_is_refused_with_a_sentence_that_shows_no_secret(url, sentence):
    with pytest.raises(Misconfigured, match=sentence) as refused:
        StoreUrl.parse(url)

    assert "s3cret" not in str(refused.value)

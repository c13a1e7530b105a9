"""Parsing image addresses: a malformed one is `uri_invalid`, and a host has one name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import Poison
from workers.ingest.addresses import parse_address

SECRET = "sesame"  # in every query and password below; must be in no message


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("https://Images.Example/a.jpg", "https://images.example:443"),
        ("http://images.example:8080/a.jpg?x=1", "http://images.example:8080"),
        ("http://images.example./a.jpg", "http://images.example.:80"),
        ("HTTP://h/a", "http://h:80"),
        (" https://h/a.jpg\n", "https://h:443"),
        ("https://bücher.example/a.jpg", "https://xn--bcher-kva.example:443"),
        ("https://under_score.example/a", "https://under_score.example:443"),
        ("http://[2606:4700::1]:81/a", "http://2606:4700::1:81"),
        ("https://h/%zz/ä?q=%", "https://h:443"),
        ("s3://bucket/a/b c.jpg", "s3://bucket"),
        ("gs://bucket/a", "gs://bucket"),
        ("file:///a%20b.jpg", "file"),
    ],
)
def test_an_address_belongs_to_a_host(uri, host):
    assert parse_address(uri).host == host


INVALID = [
    "/etc/passwd",
    "",
    "images.example/a.jpg",
    "https:/h/a",
    "https://h/\r\nX-Injected: 1",
    "http:///nothing",
    f"http://h:port/?{SECRET}",
    f"http://h:99999/?{SECRET}",
    "http://h:-1/",
    "http://h:0/",
    "http://h: 80/",
    f"http://[::1/?{SECRET}",
    "http://[::g]/",
    "http://[]/",
    "http://::1/",
    "http://images..example.com/a.jpg",
    "http://.example.com/",
    "http://./",
    "http://../",
    "http://images.example.com../a.jpg",
    "http://" + "a" * 64 + ".example/",
    "http://" + "a." * 127 + "example.com/",
    "http://exa mple.com/",
    "http://ex%41mple.com/",
    "http://ex%2Fample.com/",
    "http://exam<ple.com/",
    "http://xn--\udcff.example/",
    "http://\ud83d.example/",
    "http://\u2603\u200d.example\u3002\u3002/",
    "http://a\u3002\u3002b/",
    "http://*.example.com/",
    "http://,/",
    "http://?/",
    "http://#",
    "http://@/",
    "s3:///key",
    "s3://bucket",
    "s3://bucket/",
    f"s3://key:{SECRET}@bucket/a",
    "gs://b/a",
    "file://server/a.jpg",
    "file://a.jpg",
    "file:///a?b",
    "file:///a#b",
    "file:///a%00b",
    "file:///a%0Ab",
    "file:///%ff",
    "data:image/png;base64,AAAA",
    "DATA://image/png;base64,AAAA",
]


@pytest.mark.parametrize("uri", INVALID)
def test_a_malformed_address_is_invalid(uri):
    with pytest.raises(Poison) as caught:
        parse_address(uri)

    assert caught.value.code == "uri_invalid"
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        f"http://user:{SECRET}@h.example/",
        f"http://{SECRET}@h.example/",
        "ftp://h.example/a",
        "memory://a",
        "javascript://alert",
    ],
)
def test_an_address_of_another_kind_is_not_allowed(uri):
    with pytest.raises(Poison) as caught:
        parse_address(uri)

    assert caught.value.code == "uri_not_allowed"
    assert SECRET not in str(caught.value)


def test_the_refusal_of_a_data_address_names_the_field_for_the_bytes():
    with pytest.raises(Poison, match="put its base64 text into the event's field `data`"):
        parse_address("data:image/png;base64,AAAA")


@given(
    st.sampled_from(["", "http://", "https://", "http://h/", "http://h:", "http://[", "s3://", "file://", "http://u@"]),
    st.text(st.characters(exclude_categories=[]), max_size=80),
)
def test_any_text_is_an_address_or_a_refusal(start, rest):
    try:
        address = parse_address(start + rest)
    except Poison as error:
        assert error.code in ("uri_invalid", "uri_not_allowed")  # noqa: PT017
        assert len(str(error)) < 500  # noqa: PT017
    else:
        assert address.host

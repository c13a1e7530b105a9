"""Secrets are found and masked, whole and wherever they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.secrets import SecretMask, mask_addresses, mask_setting, secrets_in


@given(st.text(st.characters(blacklist_categories=["Z", "C"], blacklist_characters="&"), min_size=8))
def test_no_password_survives_masking(password):
    for text in (
        f"at redis://user:{password}@host:1/0 now",
        f"redis://:{password}@host",
        f"unix:///s?password={password}",
    ):
        assert password not in mask_addresses(text)


def test_the_rest_of_an_address_stays_readable():
    assert mask_addresses("Error 111 connecting to redis://worker:pw@host:6379/0?ssl_password=x&db=1") == (
        "Error 111 connecting to redis://worker:***@host:6379/0?ssl_password=***&db=1"
    )


@pytest.mark.parametrize(
    ("value", "secrets"),
    [
        ("hush1", ["hush1"]),
        ("", []),
        ("redis://host:6379/0", []),
        ("redis://worker:hush%403@host:6379/0?ssl_password=hush4", ["hush%403", "hush4", "hush@3"]),
        ("redis+sentinel://:pa/ss@host/tokens?sentinel_password=x%2Fy", ["pa/ss", "x%2Fy", "x/y"]),
    ],
)
def test_the_secrets_of_a_setting_are_its_passwords_as_written_and_unquoted(value, secrets):
    assert secrets_in(value) == secrets


def test_a_setting_is_shown_without_its_secret():
    assert mask_setting("hush1") == "***"
    assert mask_setting("redis://worker:hush@host/0") == "redis://worker:***@host/0"


def test_a_secret_inside_another_does_not_betray_it():
    mask = SecretMask(["hush", "hush-hush-123", "pw"])

    assert mask("login with hush-hush-123 and pw at redis://u:x@h") == "login with *** and pw at redis://u:***@h"

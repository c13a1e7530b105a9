"""API keys: known by their hashes, two at a time while one is replaced, and never repeated in an error."""

import hashlib

import pytest

from workers.gateway.api_keys import ANYONE, ApiKeys, key_in, new_key


def test_a_new_key_is_valid_under_its_name():
    key, entry = new_key("search-team")

    assert ApiKeys.parse(entry).caller_of(key) == "search-team"


def test_two_keys_of_one_name_are_valid_while_one_is_replaced():
    (old, old_entry), (new, new_entry) = new_key("team"), new_key("team")
    keys = ApiKeys.parse(f"{old_entry},\n {new_entry}")

    assert keys.caller_of(old) == keys.caller_of(new) == "team"


@pytest.mark.parametrize("key", [None, "", "wrong", "\udcff", "a" * 100_000])
def test_a_wrong_key_has_no_caller(key):
    assert ApiKeys.parse(new_key("team")[1]).caller_of(key) is None


def test_the_hash_itself_is_no_key():
    entry = new_key("team")[1]

    assert ApiKeys.parse(entry).caller_of(entry.partition(":")[2]) is None


def test_without_keys_anyone_may_call():
    assert ApiKeys.parse("").caller_of(None) == ANYONE
    assert not ApiKeys.parse("").are_required


@pytest.mark.parametrize("text", ["secret-key", "team:secret", "team:" + "A" * 64, ":" + "a" * 64])
def test_an_entry_that_is_no_hash_is_refused_without_repeating_it(text):
    with pytest.raises(ValueError, match="--new-key") as caught:
        ApiKeys.parse(text)

    assert text not in str(caught.value)


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "key"),
    [
        ("Bearer k", None, "k"),
        ("bearer  k ", None, "k"),
        (None, "k", "k"),
        ("Basic dXNlcg==", "k", "k"),
        ("Bearer", None, ""),
        (None, None, None),
    ],
)
def test_a_key_is_read_from_the_headers_that_clients_send(authorization, x_api_key, key):
    assert key_in(authorization, x_api_key) == key


def test_an_entry_holds_the_sha256_of_the_key():
    key, entry = new_key("team")

    assert entry == f"team:{hashlib.sha256(key.encode()).hexdigest()}"

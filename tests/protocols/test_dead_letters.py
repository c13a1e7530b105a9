"""Dead letters: the original and its cause, in a form that can be published again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.dead_letters import HEADER_PREFIX, MAX_MESSAGE_CHARS, DeadLetter

names = st.text(max_size=10).filter(lambda name: not name.startswith(HEADER_PREFIX))
letters = st.builds(
    DeadLetter,
    topic=st.from_regex(r"[a-z.]{1,20}", fullmatch=True),
    partition=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 2**63 - 1),
    value=st.binary(max_size=100),
    key=st.none() | st.binary(max_size=10),
    headers=st.lists(st.tuples(names, st.binary(max_size=10)), max_size=4).map(tuple),
    error_class=st.text(max_size=20),
    error_code=st.text(max_size=20),
    message=st.text(max_size=50),
    attempts=st.integers(1, 100),
    truncated=st.booleans(),
)


def letter(**changes):
    fields = {"topic": "images.new", "partition": 3, "offset": 41, "value": b"{", "key": b"img-7", "headers": ()}
    fields |= {"error_class": "EventError", "error_code": "undecodable", "message": "not JSON"}
    return DeadLetter(**fields | changes)


@given(letter=letters)
def test_a_dead_letter_survives_the_topic(letter):
    assert DeadLetter.from_message(letter.key, letter.value, letter.to_headers()) == letter


def test_the_original_headers_come_first_repeats_included():
    original = (("traceparent", b"00-1"), ("x", b"1"), ("x", b"2"))

    assert letter(headers=original).to_headers()[:3] == original


def test_a_replayed_letter_that_dies_again_has_one_cause():
    first = letter(message="first", attempts=4)

    again = letter(headers=first.to_headers(), message="second")

    assert again.to_headers() == letter(message="second").to_headers()


@given(message=st.text(st.characters(), max_size=20) | st.just("\ud800" * 5_000))
def test_any_message_can_be_published_and_is_bounded(message):
    headers = dict(letter(message=message).to_headers())

    assert len(headers["dead-letter-message"].decode()) <= MAX_MESSAGE_CHARS


@pytest.mark.parametrize("lost", ["dead-letter-topic", "dead-letter-attempts"])
def test_an_ordinary_message_is_no_dead_letter(lost):
    headers = tuple(header for header in letter().to_headers() if header[0] != lost)

    with pytest.raises(ValueError, match=lost):
        DeadLetter.from_message(None, b"", headers)


def test_a_partition_that_is_no_number_is_no_dead_letter():
    headers = (*letter().to_headers(), ("dead-letter-partition", b"three"))

    with pytest.raises(ValueError, match="must be numbers"):
        DeadLetter.from_message(None, b"", headers)


def published_bytes(of):
    headers = of.to_headers()
    return len(of.value) + len(of.key or b"") + sum(len(name.encode()) + len(value) for name, value in headers)


def test_a_letter_too_large_for_the_broker_loses_its_end_and_says_so():
    whole = letter(value=bytes(range(256)) * 40, headers=(("traceparent", b"00-1"),))

    short = whole.shortened(4_000)

    assert short.truncated
    assert dict(short.to_headers())["dead-letter-truncated"] == b"true"
    assert 3_000 < published_bytes(short) <= 4_000
    assert whole.value.startswith(short.value)
    assert short.headers == whole.headers


def test_headers_that_do_not_fit_go_before_the_value_does():
    short = letter(headers=(("x", bytes(10_000)),)).shortened(2_000)

    assert (short.headers, short.key, short.value, short.truncated) == ((), b"img-7", b"{", True)


def test_a_key_that_does_not_fit_goes_too():
    short = letter(key=bytes(10_000)).shortened(2_000)

    assert (short.key, short.value) == (None, b"{")

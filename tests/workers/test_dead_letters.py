"""Dead letters keep what arrived, and are shortened until the broker takes them."""

from __future__ import annotations

import pytest

from protocols.dead_letters import DeadLetter
from workers.dead_letters import MIN_LETTER_BYTES, DeadLetters
from workers.errors import Poison, TooLarge, TopicRefused
from workers.metrics import Metrics
from workers.ports import Partition, Record


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def dead_letters(metrics):
    return DeadLetters(lambda topic: f"{topic}.dlq", 100_000, metrics)


def record(value: bytes | None) -> Record:
    return Record(Partition("in", 3), 7, b"key", value, (("h", b"1"),), 0)


def letter_of(message) -> DeadLetter:
    return DeadLetter.from_message(message.key, message.value, message.headers)


@pytest.mark.parametrize("value", [None, b"", b"value"])
def test_key_value_and_headers_are_those_that_arrived(dead_letters, metrics, value):
    (message,) = dead_letters.finished(record(value), Poison("undecodable", "no")).messages

    letter = letter_of(message)
    assert message.topic == "in.dlq"
    assert (letter.key, letter.value, letter.headers) == (b"key", value, (("h", b"1"),))
    assert (letter.partition, letter.offset, letter.error_code, letter.error_class) == (3, 7, "undecodable", "Poison")
    assert metrics.registry.get_sample_value("edje_dead_letters_total", {"code": "undecodable"}) == 1


def test_a_letter_is_shortened_until_the_topic_takes_it(dead_letters, metrics):
    message = dead_letters.of(record(b"x" * 200_000), error_class="E", code="c", message="m")
    sizes = []

    while (shorter := message.instead(TooLarge("no"))) is not None:
        message = shorter
        sizes.append(message.num_bytes() + sum(len(name) + len(value) for name, value in message.headers))

    assert sizes == sorted(sizes, reverse=True)
    assert MIN_LETTER_BYTES / 4 < sizes[-1] < 4 * MIN_LETTER_BYTES
    assert letter_of(message).truncated
    assert metrics.registry.get_sample_value("edje_dead_letters_total", {"code": "c"}) == 1


def test_a_letter_whose_topic_is_refused_is_not_shortened(dead_letters):
    assert dead_letters.of(record(b"v"), error_class="E", code="c", message="m").instead(TopicRefused("no")) is None

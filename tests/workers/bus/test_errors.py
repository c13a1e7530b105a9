"""Kafka's errors as a worker sees them: by remedy, and in one sentence."""

from __future__ import annotations

import kafka.errors as kafka_errors
import pytest

from workers.bus.errors import refusal, translated, translating
from workers.errors import Misconfigured, TooLarge, TopicRefused, Transient
from workers.ports import Outgoing

MESSAGE = Outgoing("replies", b"key", b"value")


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (kafka_errors.KafkaTimeoutError("too slow"), Transient, "KafkaTimeoutError: too slow"),
        (kafka_errors.RebalanceInProgressError(), Transient, "[Error 27] RebalanceInProgressError"),
        (
            kafka_errors.GroupAuthorizationFailedError("g"),
            Misconfigured,
            "Kafka refuses this worker: [Error 30] GroupAuthorizationFailedError: g",
        ),
    ],
)
def test_an_error_with_a_remedy_names_itself_once(error, kind, sentence):
    known = translated(error)

    assert (type(known), str(known)) == (kind, sentence)
    with pytest.raises(kind), translating():
        raise error


def test_an_error_without_a_remedy_is_not_translated():
    error = kafka_errors.IllegalStateError("a bug")

    assert translated(error) is error
    with pytest.raises(kafka_errors.IllegalStateError), translating():
        raise error


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (kafka_errors.MessageSizeTooLargeError(), TooLarge, "a message of 8 bytes is too large for the topic replies"),
        (
            kafka_errors.TopicAuthorizationFailedError({"replies"}),
            TopicRefused,
            "the topic replies does not take the message: TOPIC_AUTHORIZATION_FAILED",
        ),
        (
            kafka_errors.PolicyViolationError(),
            TopicRefused,
            "the topic replies does not take the message: POLICY_VIOLATION",
        ),
    ],
)
def test_a_refusal_names_the_message_by_its_number_and_its_topic(error, kind, sentence):
    refused = refusal(error, MESSAGE, 3)

    assert (type(refused), str(refused), refused.message_number) == (kind, sentence, 3)


@pytest.mark.parametrize("error", [None, kafka_errors.NotEnoughReplicasError(), kafka_errors.ProducerFencedError()])
def test_an_error_that_another_attempt_may_resolve_is_no_refusal(error):
    assert refusal(error, MESSAGE) is None

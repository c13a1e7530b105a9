"""Kafka's errors by remedy: what a worker can do about each, and what each says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import kafka.errors as kafka_errors

from workers.errors import Misconfigured, Refused, TooLarge, TopicRefused, Transient
from workers.ports import Outgoing

MISCONFIGURED = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.KafkaConfigurationError,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.InvalidTopicError,
)
#: The group or the transaction has moved on; the next attempt, with fresh membership, decides.
REBALANCING = (
    kafka_errors.CommitFailedError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.FencedInstanceIdError,
    kafka_errors.TransactionAbortedError,
    kafka_errors.TransactionAbortableError,
    kafka_errors.ProducerFencedError,  # also what a transaction over its time limit and a restarted broker end in
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.OutOfOrderSequenceNumberError,
    kafka_errors.UnknownProducerIdError,
)
TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
#: What the broker says of a message that its topic will never take, while it may take the next one of another topic.
TOPIC_REFUSED = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.InvalidTopicError,
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTimestampError,
    kafka_errors.PolicyViolationError,
)


def translated(error: BaseException) -> BaseException:
    """The worker's error for a Kafka error; an error with no remedy comes back as it is."""
    if isinstance(error, MISCONFIGURED):
        return Misconfigured(f"Kafka refuses this worker: {error}")  # Kafka's errors begin with their names
    if isinstance(error, (kafka_errors.RetriableError, *REBALANCING)):
        return Transient(str(error))
    return error


def refusal(error: BaseException | None, message: Outgoing, message_number: int = 0) -> Refused | None:
    """The refusal of one message, if that is what publishing it ended in."""
    if isinstance(error, TOO_LARGE):
        size = message.num_bytes()
        return TooLarge(f"a message of {size} bytes is too large for the topic {message.topic}", message_number)
    if isinstance(error, TOPIC_REFUSED):
        reason = type(error).message  # the error itself may quote what is not for the sender of a request
        return TopicRefused(f"the topic {message.topic} does not take the message: {reason}", message_number)
    return None


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Turn Kafka's errors into the worker's."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        known = translated(error)
        if known is error:
            raise
        raise known from error

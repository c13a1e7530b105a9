"""Translates Kafka's errors into the worker's errors, which are grouped by remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import kafka.errors as kafka_errors
import structlog

from workers.errors import Misconfigured, Refused, TooLarge, TopicRefused, Transient, as_internal_error
from workers.ports import Outgoing

log = structlog.get_logger(__name__)

MISCONFIGURED = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.KafkaConfigurationError,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.InvalidTopicError,
)
#: The membership or the transaction is out of date; the next attempt uses the current membership.
REBALANCING = (
    kafka_errors.CommitFailedError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.FencedInstanceIdError,
    kafka_errors.TransactionAbortedError,
    kafka_errors.TransactionAbortableError,
    kafka_errors.ProducerFencedError,  # also after a transaction timeout or a broker restart
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.OutOfOrderSequenceNumberError,
    kafka_errors.UnknownProducerIdError,
)
TOO_LARGE = (kafka_errors.MessageSizeTooLargeError, kafka_errors.RecordListTooLargeError)
#: The topic never accepts this message, but may accept the next one.
TOPIC_REFUSED = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.InvalidTopicError,
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTimestampError,
    kafka_errors.PolicyViolationError,
)


def translated(error: BaseException) -> BaseException:
    """Return the worker's error for a Kafka error; any other error is returned unchanged."""
    if isinstance(error, MISCONFIGURED):
        return Misconfigured(f"Kafka refuses this worker: {error}")  # Kafka's errors begin with their names
    if isinstance(error, (kafka_errors.RetriableError, *REBALANCING)):
        return Transient(str(error))
    return error


def refusal(error: BaseException | None, message: Outgoing, message_number: int = 0) -> Refused | None:
    """Return the refusal of one message, None if publishing failed for another reason."""
    if isinstance(error, TOO_LARGE):
        size = message.num_bytes()
        return TooLarge(f"a message of {size} bytes is too large for the topic {message.topic}", message_number)
    if isinstance(error, TOPIC_REFUSED):
        reason = type(error).message  # its text may quote what a sender must not see
        return TopicRefused(f"the topic {message.topic} does not take the message: {reason}", message_number)
    return None


def failure(error: BaseException, message: Outgoing) -> Exception:
    """Return why publishing one message failed: `Refused`, `Transient` or `Misconfigured`.

    An unknown error of Kafka is retried; any other error is a fault of this message alone, which is refused.
    """
    if isinstance(error, Refused):
        return error
    known = refusal(error, message) or translated(error)
    if isinstance(known, (Refused, Transient, Misconfigured)):
        return known
    if isinstance(error, kafka_errors.KafkaError):
        return Transient(f"{type(error).__name__}: {error}")
    internal = as_internal_error(error, topic=message.topic)
    return Refused(internal.code, str(internal))


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Raise Kafka's errors as the worker's errors."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        known = translated(error)
        if known is error:
            raise
        raise known from error

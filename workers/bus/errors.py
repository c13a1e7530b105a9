"""Kafka's errors by remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import kafka.errors as kafka_errors

from workers.errors import Misconfigured, TooLarge, Transient

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


def translated(error: BaseException) -> BaseException:
    """The worker's error for a Kafka error; an error with no remedy comes back as it is."""
    if isinstance(error, TOO_LARGE):
        return TooLarge(str(error))
    if isinstance(error, MISCONFIGURED):
        return Misconfigured(f"Kafka refuses this worker: {type(error).__name__}: {error}")
    if isinstance(error, (kafka_errors.RetriableError, *REBALANCING)):
        return Transient(f"{type(error).__name__}: {error}")
    return error


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

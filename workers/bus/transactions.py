"""The publishing side of the bus in transactions: messages and the offsets they answer, all or nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import kafka.errors as kafka_errors
import structlog
from kafka import KafkaProducer

from workers.bus.clients import kafka_offsets, send_to, started
from workers.bus.consumer import SESSION_TIMEOUT_MS
from workers.bus.errors import REBALANCING, refusal, translating
from workers.bus.kafka_internals import (
    abort_transaction,
    close_producer,
    commit_transaction,
    is_topic_known,
    send_offsets,
)
from workers.bus.topics import TopicResolver
from workers.errors import Refused, TopicRefused, Transient
from workers.ports import Commit, Outgoing, Partition

log = structlog.get_logger(__name__)

#: How long one request to the transaction's coordinator may go unanswered. A coordinator that has moved answers a new
#: producer, which finds it, at once.
COORDINATOR_LIMIT_S = 5.0
#: How long the start of a producer may take, which waits for the end of its predecessor's transaction.
START_LIMIT_MS = 10_000


class KafkaTransactionalOutbox:
    """A transactional producer whose transactions carry a group's offsets; implements `TransactionalOutbox`."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        *,
        transactional_id: str,
        membership: Callable[[], Any],
        committed: Callable[[Collection[Partition]], Mapping[Partition, Commit]],
        max_message_bytes: int,
        transaction_timeout_ms: int = SESSION_TIMEOUT_MS,
    ) -> None:
        """`membership` returns the consumer's group membership at the moment of each transaction.

        `committed` returns the group's committed offsets, once no transaction that could change them is open.
        """
        self._membership = membership
        self._committed = committed
        self._settings = {
            **connection,
            "transactional_id": transactional_id,
            "allow_auto_create_topics": False,
            "max_block_ms": START_LIMIT_MS,
            "max_request_size": max_message_bytes,
            "transaction_timeout_ms": transaction_timeout_ms,
            # After that the broker has aborted the transaction: what is still being sent has no effect.
            "delivery_timeout_ms": transaction_timeout_ms,
            "request_timeout_ms": transaction_timeout_ms,
        }
        self._flush_limit_s = 2 * transaction_timeout_ms / 1000  # each message has failed by then
        self._unknown: Mapping[Partition, Commit] = {}  # offsets of a transaction whose end is not known
        self._producer: Any = self._opened()
        self._resolver = TopicResolver(lambda: self._producer, lambda topic, decision: None)
        self._outcome: Future[None] = Future()

    def _opened(self) -> Any:
        producer = started(KafkaProducer, **self._settings)
        try:
            with translating():
                producer.init_transactions()
        except BaseException:
            close_producer(producer, 0)
            raise
        return producer

    def is_decided(self, topic: str) -> bool:
        return self._resolver.is_decided(topic)

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, Commit]) -> None:
        # On a thread that `close` can leave behind, however long the broker stays away.
        outcome = self._outcome = Future[None]()
        threading.Thread(
            target=self._settle, args=(outcome, messages, offsets), name="kafka-transaction", daemon=True
        ).start()
        outcome.result()

    def _settle(self, outcome: Future[None], messages: Sequence[Outgoing], offsets: Mapping[Partition, Commit]) -> None:
        with contextlib.suppress(InvalidStateError):  # closed meanwhile
            try:
                self._publish(messages, offsets)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

    def _publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, Commit]) -> None:
        if self._unknown and self._was_committed():
            return  # after an unknown end the caller repeats the same messages, or a part of them
        # Before the first message: with a later membership, offsets of partitions that have moved meanwhile would pass.
        membership = self._membership()
        if membership.generation_id < 0:
            # The broker takes the offsets of a transaction that names no generation from any client.
            raise Transient("this worker is not a member of its group now")
        with translating():
            self._know_topics({message.topic: number for number, message in enumerate(messages)})
            try:
                with self._transaction() as producer:
                    refusals = _flush(producer, messages, self._flush_limit_s)
                    if not refusals:
                        send_offsets(producer, kafka_offsets(offsets), membership, COORDINATOR_LIMIT_S)
                        _commit(producer)
                        return
                    self._give_up()
            except _UnknownEnd as error:
                log.warning("a transaction may or may not be committed; asking the broker", error=str(error))
                self._unknown = offsets
                if self._was_committed():
                    return
                raise Transient(f"the transaction was not committed: {error}") from error
            refused = self._culprit(messages, refusals)
        if isinstance(refused, TopicRefused) and messages[refused.message_number].partition is None:
            self._resolver.refuse(messages[refused.message_number].topic, refused)
        raise refused

    def _was_committed(self) -> bool:
        """Whether the transaction with the unknown end was committed. Raises `Transient` while that is not known.

        The start of a new producer ends the transaction: it is completed if the coordinator has received the commit,
        else aborted. Then the offsets of all its partitions have moved, or none.
        """
        if self._producer is None:
            self._producer = self._opened()
        committed = self._committed(self._unknown.keys())
        was_committed = all(
            partition in committed and committed[partition].offset >= commit.offset
            for partition, commit in self._unknown.items()
        )
        log.info("the end of the transaction is known", committed=was_committed)
        self._unknown = {}
        return was_committed

    def _know_topics(self, topics: Mapping[str, int]) -> None:
        """Make the producer know these topics, each with the index of a message to it.

        Outside of a transaction, whose time would run meanwhile. Raises `TopicRefused`, or `Transient` if no broker
        answers.
        """
        if self._producer is None:
            self._producer = self._opened()
        self._resolver.wait_for([topic for topic in topics if not self._resolver.is_decided(topic)])
        for topic, number in topics.items():
            refused = self._resolver.refusal(topic, number)
            if refused is not None:
                raise refused
        unknown = [topic for topic in topics if not is_topic_known(self._producer, topic)]
        if unknown:
            raise Transient(f"no broker answers whether the topic {unknown[0]} exists")

    def _culprit(self, messages: Sequence[Outgoing], refusals: Sequence[Refused]) -> Refused:
        """Find the refused message: one fails all that are sent with it with its own error."""
        for suspect in _suspects(messages, refusals):
            number = suspect.message_number
            self._know_topics({messages[number].topic: number})
            with self._transaction() as producer:
                alone = _flush(producer, [messages[number]], self._flush_limit_s)
                self._give_up()
            if alone:
                refused = alone[0]
                refused.message_number = number
                return refused
        raise Transient("the broker refused a message, and then did not")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """Begin one, and abort it where the block fails."""
        if self._producer is None:
            self._producer = self._opened()
        try:
            self._producer.begin_transaction()
            yield self._producer
        except _UnknownEnd:
            producer, self._producer = self._producer, None
            close_producer(producer, 0)  # without an abort: the next producer ends the transaction either way
            raise
        except BaseException as error:
            self._give_up()
            if type(error) is kafka_errors.KafkaError:
                # All that kafka-python reports of a producer in a state it cannot leave; the next one starts afresh.
                raise Transient(str(error)) from error
            raise

    def _give_up(self) -> None:
        """Abort, and start a new producer at the next attempt.

        kafka-python continues to count from the numbers of refused messages, which the broker has not seen; and where
        the abort fails, the start of the new producer aborts for it.
        """
        producer, self._producer = self._producer, None
        if producer is None:  # given up inside the block
            return
        try:
            abort_transaction(producer, COORDINATOR_LIMIT_S)
        except kafka_errors.KafkaError as error:
            log.warning("transaction could not be aborted by its producer", error=str(error))
        close_producer(producer, 0)

    def close(self, timeout_s: float) -> None:
        self._resolver.close(timeout_s)
        producer = self._producer
        if producer is not None:
            close_producer(producer, timeout_s)
        if not self._outcome.done():
            with contextlib.suppress(InvalidStateError):  # it was done just now
                self._outcome.set_exception(Transient("the worker ends while a transaction is open"))


class _UnknownEnd(Exception):
    """A commit was sent and not answered."""


def _commit(producer: Any) -> None:
    try:
        commit_transaction(producer, COORDINATOR_LIMIT_S)
    except kafka_errors.KafkaError as error:
        if isinstance(error, REBALANCING):
            raise
        raise _UnknownEnd(str(error)) from error


def _flush(producer: Any, messages: Sequence[Outgoing], limit_s: float) -> list[Refused]:
    """Send and wait; returns the refusals of the messages that failed with one. Raises for any other failure."""
    give_up_at = time.monotonic() + limit_s
    futures: list[Any] = []
    stopped: BaseException | None = None
    for number, message in enumerate(messages):
        try:
            futures.append(send_to(producer, message))
        except TopicRefused as error:
            error.message_number = number
            raise
        except kafka_errors.KafkaError as error:
            refused = refusal(error, message, number)
            if refused is not None:
                raise refused from error
            stopped = error  # as a rule by the failure of an earlier message, whose future has the better reason
            break
    for future in futures:
        # Not `flush`, which takes it for a bug that a batch too large for its topic has been split and goes on in two.
        with contextlib.suppress(kafka_errors.KafkaError):
            future.get(timeout=max(0.0, give_up_at - time.monotonic()))
    ended = [(future.exception, number) for number, future in enumerate(futures) if future.exception is not None]
    refusals = [refused for error, number in ended if (refused := refusal(error, messages[number], number))]
    cause = ended[0][0] if ended else stopped
    if cause is not None and not refusals:
        raise cause  # a lost message does not always fail its transaction
    if not all(future.is_done for future in futures):
        raise kafka_errors.KafkaTimeoutError(f"no answer of the broker to a message in {limit_s:g} s")
    return refusals


def _suspects(messages: Sequence[Outgoing], refusals: Sequence[Refused]) -> list[Refused]:
    """The messages to try alone: of each topic the largest refused one, because size and topic decide."""
    largest: dict[str, Refused] = {}
    for refused in sorted(refusals, key=lambda refused: messages[refused.message_number].num_bytes(), reverse=True):
        largest.setdefault(messages[refused.message_number].topic, refused)
    return list(largest.values())

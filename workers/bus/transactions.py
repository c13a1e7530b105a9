"""The publishing side of the bus in transactions: messages and the offsets of the answered records, all or nothing."""

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

#: Timeout of one request to the transaction's coordinator. If the coordinator has moved, a new producer finds it and
#: gets an answer at once.
COORDINATOR_LIMIT_S = 5.0
#: Timeout of a producer's start, which waits for the end of its predecessor's transaction.
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
            "max_block_ms": START_LIMIT_MS,
            "max_request_size": max_message_bytes,
            "transaction_timeout_ms": transaction_timeout_ms,
            # After this time the broker has aborted the transaction, and later sends have no effect.
            "delivery_timeout_ms": transaction_timeout_ms,
            "request_timeout_ms": transaction_timeout_ms,
        }
        self._flush_limit_s = 2 * transaction_timeout_ms / 1000  # every message has succeeded or failed by then
        self._unknown: Mapping[Partition, Commit] = {}  # offsets of a transaction that may or may not be committed
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
            return  # it was committed: the caller repeats the same messages, or some of them
        # Read before the first message: with a later one the broker would accept offsets of partitions that have moved.
        membership = self._membership()
        if membership.generation_id < 0:
            # Without a generation in the transaction, the broker would accept the offsets from any client.
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
        """Whether the unconfirmed transaction was committed. Raises `Transient` while the broker has not decided.

        The start of a new producer ends the transaction: committed if the coordinator has received the commit,
        else aborted. Then the committed offsets of all its partitions have advanced, or of none.
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
        """Look up these topics, each given with the index of a message to it.

        Called outside a transaction, whose timeout would run meanwhile. Raises `TopicRefused`, or `Transient` if no
        broker answers.
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
        """Return the refusal of the one message at fault: its error fails every message that was sent with it."""
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
        raise Transient("the broker refused one of several messages, then accepted each one alone")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """Begin a transaction for the block, and abort it if the block fails."""
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
                # kafka-python reports an unusable producer by this error only; the next attempt makes a new producer.
                raise Transient(str(error)) from error
            raise

    def _give_up(self) -> None:
        """Abort the transaction, and make a new producer at the next attempt.

        kafka-python counts on from the sequence numbers of refused messages, which the broker has not seen. If
        the abort fails, the start of the new producer aborts the transaction.
        """
        producer, self._producer = self._producer, None
        if producer is None:  # already given up inside the block
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
            with contextlib.suppress(InvalidStateError):  # ended meanwhile
                self._outcome.set_exception(Transient("the worker ends while a transaction is open"))


class _UnknownEnd(Exception):
    """A commit was sent but not answered, so the transaction may or may not be committed."""


def _commit(producer: Any) -> None:
    try:
        commit_transaction(producer, COORDINATOR_LIMIT_S)
    except kafka_errors.KafkaError as error:
        if isinstance(error, REBALANCING):
            raise
        raise _UnknownEnd(str(error)) from error


def _flush(producer: Any, messages: Sequence[Outgoing], limit_s: float) -> list[Refused]:
    """Send the messages and wait; returns the refusals. Raises any other failure."""
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
            stopped = error  # usually caused by an earlier message, whose future has the precise error
            break
    for future in futures:
        # Not `flush`, which fails when a batch that is too large for its topic has been split in two.
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
    """Return the messages to try alone: the largest refused one of each topic, because size and topic decide."""
    largest: dict[str, Refused] = {}
    for refused in sorted(refusals, key=lambda refused: messages[refused.message_number].num_bytes(), reverse=True):
        largest.setdefault(messages[refused.message_number].topic, refused)
    return list(largest.values())

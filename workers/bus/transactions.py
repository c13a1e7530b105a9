"""The publishing side of the bus in transactions: messages and the offsets they answer, all or nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import kafka.errors as kafka_errors
import structlog
from kafka import KafkaProducer

from workers.bus.clients import close_producer, kafka_offsets, send_to, started
from workers.bus.errors import REBALANCING, TOO_LARGE, translating
from workers.bus.inbox import SESSION_TIMEOUT_MS
from workers.errors import TooLarge, Transient, WorkerError
from workers.ports import Outgoing, Partition

log = structlog.get_logger(__name__)


class KafkaTransactionalOutbox:
    """A transactional producer whose transactions carry a group's offsets; implements `TransactionalOutbox`."""

    def __init__(
        self,
        connection: Mapping[str, Any],
        *,
        transactional_id: str,
        membership: Callable[[], Any],
        max_message_bytes: int,
        transaction_timeout_ms: int = SESSION_TIMEOUT_MS,
    ) -> None:
        """`membership` gives the consumer's group membership at the moment of each transaction."""
        self._membership = membership
        self._settings = {
            **connection,
            "transactional_id": transactional_id,
            "max_request_size": max_message_bytes,
            "transaction_timeout_ms": transaction_timeout_ms,
            # By then the broker has aborted the transaction: what is still being sent, after an outage, is for nothing.
            "delivery_timeout_ms": transaction_timeout_ms,
            "request_timeout_ms": transaction_timeout_ms,
        }
        self._producer: Any = self._opened()
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

    def publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int]) -> None:
        # kafka-python waits for an absent broker without limit: on a thread that `close` can leave behind.
        outcome = self._outcome = Future[None]()
        threading.Thread(
            target=self._settle, args=(outcome, messages, offsets), name="kafka-transaction", daemon=True
        ).start()
        outcome.result()

    def _settle(self, outcome: Future[None], messages: Sequence[Outgoing], offsets: Mapping[Partition, int]) -> None:
        with contextlib.suppress(InvalidStateError):  # closed meanwhile
            try:
                self._publish(messages, offsets)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

    def _publish(self, messages: Sequence[Outgoing], offsets: Mapping[Partition, int]) -> None:
        # Before the first message: with a later membership, offsets of partitions that have moved meanwhile would pass.
        membership = self._membership()
        if membership.generation_id < 0:
            # The broker takes the offsets of a transaction that names no generation from anybody.
            raise Transient("this worker is not a member of its group now")
        with translating():
            with self._transaction() as producer:
                refused = _flush(producer, messages)
                if not refused:
                    producer.send_offsets_to_transaction(kafka_offsets(offsets), membership)
                    _commit(producer)
                    return
                self._give_up()
            raise self._too_large(messages, refused)

    def _too_large(self, messages: Sequence[Outgoing], refused: Sequence[int]) -> WorkerError:
        """Find which of them it was: one refused message fails all that are sent with it with its own error."""
        for number in sorted(refused, key=lambda number: len(messages[number].value), reverse=True):
            with self._transaction() as producer:
                is_refused = bool(_flush(producer, [messages[number]]))
                self._give_up()
            if is_refused:
                return TooLarge(f"the broker refuses a message of {len(messages[number].value)} bytes", number)
        return Transient("the broker refused a message for its size, and then did not")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """Begin one, and abort it where the block fails."""
        if self._producer is None:
            self._producer = self._opened()
        try:
            self._producer.begin_transaction()
            yield self._producer
        except BaseException as error:
            self._give_up()
            if type(error) is kafka_errors.KafkaError:
                # All that kafka-python says of a producer in a state it cannot leave; the next one starts anew.
                raise Transient(str(error)) from error
            raise

    def _give_up(self) -> None:
        """Abort, and start a new producer at the next attempt.

        kafka-python goes on counting from the numbers of refused messages, which the broker has not seen; and where
        the abort fails, the start of the new producer aborts for it.
        """
        producer, self._producer = self._producer, None
        try:
            producer.abort_transaction()
        except kafka_errors.KafkaError as error:
            log.warning("transaction could not be aborted by its producer", error=str(error))
        close_producer(producer, 0)

    def close(self, timeout_s: float) -> None:
        producer = self._producer
        if producer is not None:
            close_producer(producer, timeout_s)
        if not self._outcome.done():
            with contextlib.suppress(InvalidStateError):  # it was done just now
                self._outcome.set_exception(Transient("the worker ends while a transaction is open"))


def _commit(producer: Any) -> None:
    try:
        producer.commit_transaction()
    except kafka_errors.KafkaError as error:
        if isinstance(error, REBALANCING):
            raise
        # Trying again could publish twice. A restart reads from the offsets whether it was committed.
        raise RuntimeError(f"whether a transaction was committed is not known: {error}") from error


def _flush(producer: Any, messages: Sequence[Outgoing]) -> list[int]:
    """Send and wait; returns the numbers of those that failed with a refusal for size. Raises for any other."""
    futures = []
    for number, message in enumerate(messages):
        try:
            futures.append(send_to(producer, message))
        except TOO_LARGE as error:
            raise TooLarge(str(error), number) from error
    producer.flush()
    refused = [number for number, future in enumerate(futures) if isinstance(future.exception, TOO_LARGE)]
    for future in futures:
        if future.exception is not None and not refused:
            raise future.exception  # not every lost message fails the transaction that it is lost from
    return refused

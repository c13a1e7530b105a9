"""The publishing side of the bus in transactions: messages and the offsets they answer, all or nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import kafka.errors as kafka_errors
import structlog
from kafka import KafkaProducer

from workers.bus.clients import close_producer, kafka_offsets, send_to, started
from workers.bus.consumer import SESSION_TIMEOUT_MS
from workers.bus.errors import REBALANCING, refusal, translating
from workers.bus.topics import TopicLookup, is_known
from workers.errors import Refused, TopicRefused, Transient
from workers.ports import Outgoing, Partition

log = structlog.get_logger(__name__)

#: How long a commit may go without an answer. A broker that comes back by then says what became of it.
COMMIT_LIMIT_S = 60.0
#: The same of an abort, which the start of the next producer makes good.
ABORT_LIMIT_S = 5.0


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
        # By then each message has failed, and the broker would refuse the offsets.
        self._limit_s = 2 * transaction_timeout_ms / 1000
        self._producer: Any = self._opened()
        self._lookup = TopicLookup()
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
        # However long the broker stays away: on a thread that `close` can leave behind.
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
            self._meet({message.topic: number for number, message in enumerate(messages)})
            with self._transaction() as producer:
                refusals = _flush(producer, messages, self._limit_s)
                if not refusals:
                    _send_offsets(producer, offsets, membership, self._limit_s)
                    _commit(producer)
                    return
                self._give_up()
            refused = self._culprit(messages, refusals)
        if isinstance(refused, TopicRefused):
            self._lookup.note(messages[refused.message_number].topic, refused)
        raise refused

    def _meet(self, topics: Mapping[str, int]) -> None:
        """Have the producer know these topics, each with the number of a message to it.

        Outside of a transaction, whose time would run meanwhile. Raises `TopicRefused`, or `Transient` if no broker
        says whether there are such topics.
        """
        since = time.monotonic()
        while True:
            for topic, number in topics.items():
                refused = self._lookup.refusal(topic, number)
                if refused is not None:
                    raise refused
            producer = self._producer = self._producer or self._opened()
            strangers = [topic for topic in topics if not is_known(producer, topic)]
            if not strangers:
                return
            for decision in self._lookup.ask(producer, dict.fromkeys(strangers, since)).values():
                if isinstance(decision, Transient):
                    raise decision

    def _culprit(self, messages: Sequence[Outgoing], refusals: Sequence[Refused]) -> Refused:
        """Find which of them it was: one refused message fails all that are sent with it with its own error."""
        for suspect in _suspects(messages, refusals):
            number = suspect.message_number
            self._meet({messages[number].topic: number})
            with self._transaction() as producer:
                alone = _flush(producer, [messages[number]], self._limit_s)
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
            _await_answer(producer, producer._transaction_manager.begin_abort(), ABORT_LIMIT_S)
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


def _await_answer(producer: Any, asked: Any, limit_s: float) -> None:
    """Wait for what was asked of a transaction's coordinator.

    kafka-python 3.0.12 itself waits without limit. After an outage it may have lost the request: then for ever.
    """
    producer._sender.wakeup()
    if not asked.wait(limit_s * 1000):
        raise kafka_errors.KafkaTimeoutError(f"no answer of the transaction's coordinator in {limit_s:g} s")


def _send_offsets(producer: Any, offsets: Mapping[Partition, int], membership: Any, limit_s: float) -> None:
    asked = producer._transaction_manager.send_offsets_to_transaction(kafka_offsets(offsets), membership)
    _await_answer(producer, asked, limit_s)


def _commit(producer: Any) -> None:
    try:
        _await_answer(producer, producer._transaction_manager.begin_commit(), COMMIT_LIMIT_S)
    except kafka_errors.KafkaError as error:
        if isinstance(error, REBALANCING):
            raise
        # Trying again could publish twice. A restart reads from the offsets whether it was committed.
        raise RuntimeError(f"whether a transaction was committed is not known: {error}") from error


def _flush(producer: Any, messages: Sequence[Outgoing], limit_s: float) -> list[Refused]:
    """Send and wait; returns the refusals of those that failed with one. Raises for any other failure."""
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
            stopped = error  # by the failure of one that was sent before, as a rule; its future tells more
            break
    for future in futures:
        # Not `flush`, which takes it for a bug that a batch too large for its topic has been split and goes on in two.
        with contextlib.suppress(kafka_errors.KafkaError):
            future.get(timeout=max(0.0, give_up_at - time.monotonic()))
    ended = [(future.exception, number) for number, future in enumerate(futures) if future.exception is not None]
    refusals = [refused for error, number in ended if (refused := refusal(error, messages[number], number))]
    cause = ended[0][0] if ended else stopped
    if cause is not None and not refusals:
        raise cause  # not every lost message fails the transaction that it is lost from
    if not all(future.is_done for future in futures):
        raise kafka_errors.KafkaTimeoutError(f"no answer of the broker to a message in {limit_s:g} s")
    return refusals


def _suspects(messages: Sequence[Outgoing], refusals: Sequence[Refused]) -> list[Refused]:
    """Whom to try alone: of each topic the largest refused message, because there size and topic tell all."""
    largest: dict[str, Refused] = {}
    for refused in sorted(refusals, key=lambda refused: messages[refused.message_number].num_bytes(), reverse=True):
        largest.setdefault(messages[refused.message_number].topic, refused)
    return list(largest.values())

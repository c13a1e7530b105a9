"""The publishing side of the bus, message by message."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from kafka import KafkaProducer

from workers.bus.clients import send_to, started
from workers.bus.errors import failure
from workers.bus.kafka_internals import close_producer, is_topic_known
from workers.bus.topics import Decision, TopicResolver
from workers.errors import TopicRefused, Transient
from workers.ports import Outgoing

#: How long a send may block inside the producer. Sends do not block as a rule, because topics are looked up before.
MAX_BLOCK_MS = 10_000


class KafkaOutbox:
    """A producer that waits for all replicas; implements `workers.ports.Outbox`."""

    def __init__(self, connection: Mapping[str, Any], *, max_message_bytes: int, linger_ms: int = 0) -> None:
        self._producer = started(
            KafkaProducer,
            **connection,
            acks="all",
            # After the broker refuses one message for its size, an idempotent producer of kafka-python 3.0 fails every
            # later message too. This outbox may repeat messages, so it needs no idempotence.
            enable_idempotence=False,
            max_request_size=max_message_bytes,
            max_block_ms=MAX_BLOCK_MS,
            linger_ms=linger_ms,
        )
        self._lock = threading.Lock()
        self._held: dict[str, list[tuple[Outgoing, Future[None]]]] = {}  # by topic, until it has been looked up
        self._resolver = TopicResolver(lambda: self._producer, self._decided)

    def send(self, message: Outgoing) -> Future[None]:
        sent: Future[None] = Future()
        refused = self._resolver.refusal(message.topic)
        if refused is not None:
            sent.set_exception(refused)
            return sent
        with self._lock:
            is_held = message.topic in self._held or not is_topic_known(self._producer, message.topic)
            if is_held:
                self._held.setdefault(message.topic, []).append((message, sent))
            else:
                self._send(message, sent)
        if is_held:
            self._resolver.request(message.topic)
        return sent

    def _send(self, message: Outgoing, sent: Future[None]) -> None:
        try:
            pending = send_to(self._producer, message)
        except Exception as error:  # every error concerns this message alone
            self._fail(message, sent, error)
        else:
            pending.add_callback(lambda _: sent.set_result(None))
            pending.add_errback(lambda error: self._fail(message, sent, error))

    def _fail(self, message: Outgoing, sent: Future[None], error: BaseException) -> None:
        failed = failure(error, message)
        if isinstance(failed, TopicRefused) and message.partition is None:
            self._resolver.refuse(message.topic, failed)
        sent.set_exception(failed)

    def _decided(self, topic: str, decision: Decision) -> None:
        with self._lock:  # held until all are sent, so that no later message overtakes them
            for message, sent in self._held.pop(topic, ()):
                if decision is None:
                    self._send(message, sent)
                else:
                    sent.set_exception(decision)

    def close(self, timeout_s: float) -> None:
        self._resolver.close(timeout_s)
        close_producer(self._producer, timeout_s)
        with self._lock:
            held, self._held = self._held, {}
        for topic, waiting in held.items():
            for _, sent in waiting:
                sent.set_exception(Transient(f"closed before the topic {topic} was looked up"))

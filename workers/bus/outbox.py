"""The publishing side of the bus, message by message."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kafka import KafkaProducer

from workers.bus.clients import close_producer, send_to, started
from workers.bus.errors import translated
from workers.ports import Outgoing

#: How long a send may wait for a topic that the producer has not met before.
METADATA_TIMEOUT_MS = 10_000


class KafkaOutbox:
    """A producer that waits for all replicas; implements `workers.ports.Outbox`."""

    def __init__(self, connection: Mapping[str, Any], *, max_message_bytes: int, linger_ms: int = 0) -> None:
        self._producer = started(
            KafkaProducer,
            **connection,
            acks="all",
            # An idempotent producer of kafka-python 3.0 is beyond repair once the broker has refused one message
            # for its size, and fails every other message with it. A repeated message is allowed here.
            enable_idempotence=False,
            max_request_size=max_message_bytes,
            max_block_ms=METADATA_TIMEOUT_MS,
            linger_ms=linger_ms,
        )
        self._known_topics: set[str] = set()
        self._introducer = ThreadPoolExecutor(1, thread_name_prefix="kafka-new-topic")

    def send(self, message: Outgoing) -> Future[None]:
        sent: Future[None] = Future()
        if message.topic in self._known_topics:
            self._send(message, sent)
        else:
            # The first message to a topic blocks until its partitions are known: not on the loop's thread.
            self._introducer.submit(self._send, message, sent)
        return sent

    def _send(self, message: Outgoing, sent: Future[None]) -> None:
        try:
            pending = send_to(self._producer, message)
        except Exception as error:  # into the future, whatever it is: nobody looks at the introducing thread
            sent.set_exception(translated(error))
        else:
            self._known_topics.add(message.topic)
            pending.add_callback(lambda _: sent.set_result(None))
            pending.add_errback(lambda error: sent.set_exception(translated(error)))

    def close(self, timeout_s: float) -> None:
        self._introducer.shutdown(wait=False, cancel_futures=True)
        close_producer(self._producer, timeout_s)

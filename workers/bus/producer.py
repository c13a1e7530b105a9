"""The publishing side of the bus, message by message."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaProducer

from workers.bus.clients import close_producer, send_to, started
from workers.bus.errors import refusal, translated
from workers.bus.topics import TopicLookup, is_known
from workers.errors import TopicRefused, Transient
from workers.ports import Outgoing

#: How long a send may wait for room in the producer's buffer.
MAX_BLOCK_MS = 10_000


@dataclass(slots=True)
class _Stranger:
    """A topic that the producer has not met."""

    since: float = field(default_factory=time.monotonic)
    waiting: list[tuple[Outgoing, Future[None]]] = field(default_factory=list)


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
            max_block_ms=MAX_BLOCK_MS,
            linger_ms=linger_ms,
        )
        self._lookup = TopicLookup()
        self._changed = threading.Condition()
        self._strangers: dict[str, _Stranger] = {}  # until it is known whether there is such a topic
        self._closing = False
        self._introducer = threading.Thread(target=self._introduce, name="kafka-new-topic", daemon=True)
        self._introducer.start()

    def send(self, message: Outgoing) -> Future[None]:
        sent: Future[None] = Future()
        refused = self._lookup.refusal(message.topic)
        with self._changed:
            if refused is not None:
                sent.set_exception(refused)
            elif message.topic in self._strangers or not is_known(self._producer, message.topic):
                # Handing a message over blocks until its topic is known: not on the loop's thread.
                self._strangers.setdefault(message.topic, _Stranger()).waiting.append((message, sent))
                self._changed.notify()
            else:
                self._send(message, sent)
        return sent

    def _send(self, message: Outgoing, sent: Future[None]) -> None:
        try:
            pending = send_to(self._producer, message)
        except Exception as error:  # into the future, whatever it is: the introducing thread has nobody to tell
            self._fail(message, sent, error)
        else:
            pending.add_callback(lambda _: sent.set_result(None))
            pending.add_errback(lambda error: self._fail(message, sent, error))

    def _fail(self, message: Outgoing, sent: Future[None], error: BaseException) -> None:
        refused = refusal(error, message)
        if isinstance(refused, TopicRefused):
            self._lookup.note(message.topic, refused)
        sent.set_exception(refused or translated(error))

    def _introduce(self) -> None:
        """Ask about topics as long as there are any to ask about, and send or fail what waits for the answer."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._strangers or self._closing)
                if self._closing:
                    return
                asked_since = {topic: stranger.since for topic, stranger in self._strangers.items()}
            decided: Mapping[str, BaseException | None]
            try:
                decided = self._lookup.ask(self._producer, asked_since)
            except Exception as error:
                decided = dict.fromkeys(asked_since, error)
            with self._changed:  # until all are sent, so that no later message overtakes them
                for topic, decision in decided.items():
                    for message, sent in self._strangers.pop(topic).waiting:
                        if decision is None:
                            self._send(message, sent)
                        else:
                            sent.set_exception(decision)

    def close(self, timeout_s: float) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        close_producer(self._producer, timeout_s)
        self._introducer.join(timeout_s)
        for stranger in self._strangers.values():
            for _, sent in stranger.waiting:
                sent.set_exception(Transient("closed before it was known whether the topic exists"))
        self._strangers.clear()

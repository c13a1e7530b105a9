"""Finds out which topics exist for a producer, and remembers for a while which ones refuse its messages.

A producer of kafka-python blocks on a message to an unknown topic, and fails in one way for a missing topic and
for a missing broker. Here many topics are looked up at once, on a thread and in short rounds, and the two cases are
distinguished: if a broker answers and does not name the topic, the topic does not exist.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from workers.bus.kafka_internals import forget_topics, is_topic_known, is_topic_unauthorized, request_topics
from workers.errors import TopicRefused, Transient

#: How long a topic may take to appear: not every broker knows a new topic at once.
APPEARANCE_S = 2.0
#: How long a broker may be away before a lookup fails.
AWAY_S = 5.0
#: How long a refusal is remembered.
REFUSED_S = 30.0
#: Number of refusals to remember; bounded, because requests can contain any topic name.
MAX_REFUSED = 10_000
#: Longest wait for the broker in one round. kafka-python limits how often rounds are made.
ANSWER_S = 0.5

#: The result of a lookup; None: messages can be sent to the topic.
Decision = TopicRefused | Transient | None


class TopicResolver:
    """Looks up topics for a producer, which may be replaced."""

    def __init__(self, producer: Callable[[], Any], decided: Callable[[str, Decision], None]) -> None:
        """`producer` returns the current producer or None; `decided` is called on the resolver's thread."""
        self._producer = producer
        self._decided = decided
        self._changed = threading.Condition()
        self._refused: dict[str, tuple[float, str]] = {}  # by topic: until when, and the reason
        self._asked_since: dict[str, float] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kafka-topics", daemon=True)
        self._thread.start()

    def refusal(self, topic: str, message_number: int = 0) -> TopicRefused | None:
        """Return the refusal of a message to this topic if a recent refusal is remembered, else None."""
        until, reason = self._refused.get(topic, (0.0, ""))
        return TopicRefused(reason, message_number) if time.monotonic() < until else None

    def refuse(self, topic: str, refused: TopicRefused) -> None:
        """Remember that this topic accepts no messages."""
        with self._changed:
            self._refused.pop(topic, None)
            while len(self._refused) >= MAX_REFUSED:
                del self._refused[next(iter(self._refused))]  # the oldest
            self._refused[topic] = (time.monotonic() + REFUSED_S, str(refused))

    def is_decided(self, topic: str) -> bool:
        """Whether messages to this topic can be sent or refused now; starts a lookup if not."""
        producer = self._producer()
        if self.refusal(topic) is not None or (producer is not None and is_topic_known(producer, topic)):
            return True
        self.request(topic)
        return False

    def request(self, topic: str) -> None:
        """Look this topic up."""
        with self._changed:
            self._asked_since.setdefault(topic, time.monotonic())
            self._changed.notify_all()

    def wait_for(self, topics: Collection[str]) -> None:
        """Wait until the lookups of these topics have ended; each ends within `AWAY_S`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not any(topic in self._asked_since for topic in topics))

    def close(self, timeout_s: float) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked_since or self._closing)
                if self._closing:
                    return
                asked_since = dict(self._asked_since)
            for topic, decision in self._ask(asked_since).items():
                if isinstance(decision, TopicRefused):
                    self.refuse(topic, decision)
                self._decided(topic, decision)
                with self._changed:
                    self._asked_since.pop(topic, None)
                    self._changed.notify_all()

    def _ask(self, asked_since: dict[str, float]) -> dict[str, Decision]:
        """Look all of these topics up once; returns the decided ones."""
        producer, is_answered = self._producer(), False
        try:
            if producer is not None:
                is_answered = request_topics(producer, asked_since, ANSWER_S)
        except Exception:  # the producer was closed meanwhile
            producer = None
        if producer is None:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, ANSWER_S)
        decided: dict[str, Decision] = {}
        for topic, since in asked_since.items():
            waited_s = time.monotonic() - since
            if producer is not None and is_topic_known(producer, topic):
                decided[topic] = None
            elif producer is not None and is_answered and is_topic_unauthorized(producer, topic):
                decided[topic] = TopicRefused(f"this worker may not describe the topic {topic}")
            elif is_answered and waited_s >= APPEARANCE_S:
                decided[topic] = TopicRefused(f"the topic {topic} does not exist")
            elif waited_s >= AWAY_S:
                decided[topic] = Transient(f"no broker answers whether the topic {topic} exists")
        if producer is not None:
            forget_topics(producer, [topic for topic, decision in decided.items() if decision is not None])
        return decided

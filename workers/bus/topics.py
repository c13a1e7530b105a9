"""Finds out whether a producer can send to topics that it has not met; remembers for a while which it cannot.

A producer of kafka-python that is handed a message to an unknown topic blocks, and gives the same answer for a topic
that does not exist as for a broker that is away. Here many topics are asked about at once, in short rounds, and the two
are told apart: a broker that answers and still does not name the topic has none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

from workers.errors import TopicRefused, Transient

#: How long a topic may take to appear: where the broker creates topics that are asked for, it needs a moment.
APPEARANCE_S = 5.0
#: How long a refused topic counts as such before the broker is asked, or tried, again.
REFUSED_S = 30.0
#: Refused topics to remember; anybody who may send requests can make up names.
MAX_REFUSED = 10_000
#: Longest wait for the broker in one round. kafka-python sees to it that rounds are not too frequent.
ANSWER_S = 0.5

#: What became of a topic that was asked about; None: messages can be sent to it.
Decision = TopicRefused | Transient | None


def is_known(producer: Any, topic: str) -> bool:
    """Whether messages to this topic can be handed over without waiting. Internal topics are not for us to know."""
    return topic in producer._metadata.topics()


class TopicLookup:
    """What is known of topics apart from any producer, because a transactional one is replaced now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused: dict[str, tuple[float, str]] = {}  # when that ends, and why

    def refusal(self, topic: str, message_number: int = 0) -> TopicRefused | None:
        """The refusal of a message to this topic, if it was refused lately."""
        ends, reason = self._refused.get(topic, (0.0, ""))
        return TopicRefused(reason, message_number) if time.monotonic() < ends else None

    def note(self, topic: str, refused: TopicRefused) -> None:
        """Remember that this topic takes nothing from us."""
        with self._lock:
            self._refused.pop(topic, None)
            while len(self._refused) >= MAX_REFUSED:
                del self._refused[next(iter(self._refused))]  # the oldest
            self._refused[topic] = (time.monotonic() + REFUSED_S, str(refused))

    def ask(self, producer: Any, asked_since: Mapping[str, float]) -> dict[str, Decision]:
        """Ask about all of these topics once more; returns those that are decided. Waits, but not for long.

        `asked_since` says when each was first asked about, in the time of the monotonic clock.
        """
        cluster = producer._metadata
        answered = _refresh(producer, asked_since.keys())
        decided: dict[str, Decision] = {}
        now = time.monotonic()
        for topic, since in asked_since.items():
            if is_known(producer, topic):
                decided[topic] = None
            elif answered and topic in cluster.unauthorized_topics:
                decided[topic] = TopicRefused(f"the topic {topic} is not open to this worker")
            elif now - since >= APPEARANCE_S:
                decided[topic] = (
                    TopicRefused(f"the topic {topic} does not exist")
                    if answered
                    else Transient(f"no broker answers to say whether the topic {topic} exists")
                )
        for topic, decision in decided.items():
            if isinstance(decision, TopicRefused):
                self.note(topic, decision)
        # The producer would go on asking about them, ten times a second.
        cluster._topics = cluster._topics - {topic for topic, decision in decided.items() if decision is not None}
        return decided


def _refresh(producer: Any, topics: Collection[str]) -> bool:
    """Have the producer ask for these topics; returns whether a broker has answered."""
    cluster = producer._metadata
    # A new set, because Kafka's thread may be reading the old one.
    cluster._topics = cluster._topics | set(topics)
    last_answer_ms = cluster._last_successful_refresh_ms
    ended = threading.Event()
    cluster.request_update().add_both(lambda _: ended.set())
    producer._sender.wakeup()
    ended.wait(ANSWER_S)
    # Not by how the update has ended: that is the topic's own error where there is one topic.
    return bool(cluster._last_successful_refresh_ms > last_answer_ms)

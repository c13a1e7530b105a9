"""Publishes dead letters; what one holds is `protocols.dead_letters`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocols.dead_letters import DeadLetter
from workers.errors import Poison, Refused, TooLarge
from workers.metrics import Metrics
from workers.ports import Finished, Outgoing, Record


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """Writes the dead letter of a record, and counts it."""

    topic_of: Callable[[str], str]  # the dead-letter topic beside an input topic
    max_message_bytes: int
    metrics: Metrics

    def finished(self, record: Record, error: Poison) -> Finished:
        """Return the outcome that consists of the dead letter alone."""
        error_class = type(error.__cause__ or error).__name__
        return Finished(record, (self.of(record, error_class=error_class, code=error.code, message=str(error)),))

    def of(self, record: Record, *, error_class: str, code: str, message: str, attempts: int = 1) -> Outgoing:
        """The message to publish for a record that can never succeed; one too large for the broker loses its end."""
        self.metrics.count_event("dead_letter")
        self.metrics.count_dead_letter(code)
        letter = DeadLetter(
            topic=record.partition.topic,
            partition=record.partition.number,
            offset=record.offset,
            value=record.value,
            key=record.key,
            headers=record.headers,
            error_class=error_class,
            error_code=code,
            message=message,
            attempts=attempts,
        )
        topic = self.topic_of(letter.topic)

        def shortened(refused: Refused) -> Outgoing | None:
            if not isinstance(refused, TooLarge):
                return None
            short = letter.shortened(self.max_message_bytes)
            return Outgoing(topic, short.key, short.value, short.to_headers())

        return Outgoing(topic, letter.key, letter.value, letter.to_headers(), if_refused=shortened)

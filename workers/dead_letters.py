"""Makes and counts the dead letters of records; their form is `protocols.dead_letters`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocols.dead_letters import DeadLetter
from workers.errors import Poison, Refused, TooLarge
from workers.metrics import Metrics
from workers.ports import Finished, Outgoing, Record

#: A dead letter is not shortened below this size, which cause and origin need.
MIN_LETTER_BYTES = 1_000


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """Makes the dead letters of one worker."""

    topic_of: Callable[[str], str]  # the dead-letter topic of an input topic
    max_message_bytes: int
    metrics: Metrics

    def finished(self, record: Record, error: Poison) -> Finished:
        """Return the outcome that consists of the dead letter alone."""
        error_class = type(error.__cause__ or error).__name__
        return Finished(record, (self.of(record, error_class=error_class, code=error.code, message=str(error)),))

    def of(self, record: Record, *, error_class: str, code: str, message: str, attempts: int = 1) -> Outgoing:
        """Return the dead letter of a record that can never succeed, as a message.

        A letter that is too large for the broker is cut; if the topic's limit is lower still, it is cut further.
        """
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
        return _outgoing(self.topic_of(letter.topic), letter, self.max_message_bytes)


def _outgoing(topic: str, letter: DeadLetter, next_max_bytes: int) -> Outgoing:
    """Return the letter's message; if refused as too large, a message of at most `next_max_bytes` replaces it."""

    def shortened(refused: Refused) -> Outgoing | None:
        if not isinstance(refused, TooLarge) or next_max_bytes < MIN_LETTER_BYTES:
            return None
        return _outgoing(topic, letter.shortened(next_max_bytes), next_max_bytes // 4)

    return Outgoing(topic, letter.key, letter.value, letter.to_headers(), if_refused=shortened)

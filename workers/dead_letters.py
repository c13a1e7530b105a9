"""Publishes dead letters; what one holds is `protocols.dead_letters`."""

from __future__ import annotations

from protocols.dead_letters import DeadLetter
from workers.errors import Refused, TooLarge
from workers.ports import Outgoing


def dead_letter_message(letter: DeadLetter, topic: str, max_message_bytes: int) -> Outgoing:
    """The message to publish for a dead letter; one too large for the broker loses its end."""

    def shortened(refused: Refused) -> Outgoing | None:
        if not isinstance(refused, TooLarge):
            return None
        short = letter.shortened(max_message_bytes)
        return Outgoing(topic, short.key, short.value, short.to_headers())

    return Outgoing(topic, letter.key, letter.value, letter.to_headers(), if_refused=shortened)

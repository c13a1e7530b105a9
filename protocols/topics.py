"""The names of the topics.

Knows nothing of partitions, retention or who may write where.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from protocols.fields import MAX_TOPIC_CHARS, TOPIC_NAME

_DEAD_LETTER_SUFFIX = ".dlq"


@dataclass(frozen=True, slots=True)
class Topics:
    """The names of the four topics and of their dead-letter topics, all with the same prefix.

    `Topics("team-a.").images_new` is `team-a.images.new`. Raises `ValueError` for a prefix that Kafka does not accept.
    """

    prefix: str = ""

    def __post_init__(self) -> None:
        if self.prefix and not re.fullmatch(TOPIC_NAME, self.prefix):
            raise ValueError(f"topic prefix {self.prefix!r}: only letters, digits, '.', '_' and '-' are allowed")
        longest = len(self.dead_letter(self.rerank_responses))
        if longest > MAX_TOPIC_CHARS:
            raise ValueError(f"topic prefix of {len(self.prefix)} characters: names would exceed {MAX_TOPIC_CHARS}")

    @property
    def images_new(self) -> str:
        return f"{self.prefix}images.new"

    @property
    def images_indexed(self) -> str:
        return f"{self.prefix}images.indexed"

    @property
    def rerank_requests(self) -> str:
        return f"{self.prefix}rerank.requests"

    @property
    def rerank_responses(self) -> str:
        return f"{self.prefix}rerank.responses"

    @property
    def gateway_replies(self) -> str:
        return f"{self.rerank_responses}.gateway"

    def dead_letter(self, topic: str) -> str:
        """Return the topic for messages of this topic that can never succeed."""
        return topic + _DEAD_LETTER_SUFFIX

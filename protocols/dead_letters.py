"""The dead letter: a message that can never succeed, with its cause.

Key, value (a null stays null) and headers are the original ones, so a replay publishes them again; further headers name
the original topic, partition and offset, and the cause. Knows nothing of the causes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from protocols.fields import MAX_ERROR_CODE_CHARS

Headers = tuple[tuple[str, bytes], ...]

HEADER_PREFIX = "dead-letter-"
TOPIC_HEADER = "dead-letter-topic"
PARTITION_HEADER = "dead-letter-partition"
OFFSET_HEADER = "dead-letter-offset"
ERROR_CLASS_HEADER = "dead-letter-error-class"
ERROR_CODE_HEADER = "dead-letter-error-code"
MESSAGE_HEADER = "dead-letter-message"
ATTEMPTS_HEADER = "dead-letter-attempts"
TRUNCATED_HEADER = "dead-letter-truncated"

MAX_MESSAGE_CHARS = 1_000
MAX_ERROR_CLASS_CHARS = 200

#: Bytes that the broker counts per message and per header in addition to their content, rounded up.
_RECORD_OVERHEAD_BYTES = 128
_HEADER_OVERHEAD_BYTES = 10


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message that can never succeed, and the cause.

    `truncated`: value or headers were cut, so the letter can be read but not replayed.
    """

    topic: str
    partition: int
    offset: int
    value: bytes | None
    key: bytes | None
    headers: Headers  # as they arrived
    error_class: str
    error_code: str
    message: str
    attempts: int = 1
    truncated: bool = False

    def to_headers(self) -> Headers:
        """Return the headers to publish: the original ones, then the cause.

        A replayed message that fails again keeps only its latest cause.
        """
        cause = {
            TOPIC_HEADER: self.topic,
            PARTITION_HEADER: str(self.partition),
            OFFSET_HEADER: str(self.offset),
            ERROR_CLASS_HEADER: self.error_class[:MAX_ERROR_CLASS_CHARS],
            ERROR_CODE_HEADER: self.error_code[:MAX_ERROR_CODE_CHARS],
            MESSAGE_HEADER: self.message[:MAX_MESSAGE_CHARS],
            ATTEMPTS_HEADER: str(self.attempts),
        }
        if self.truncated:
            cause[TRUNCATED_HEADER] = "true"
        # "replace", because a message may quote half a surrogate pair, which cannot be encoded.
        return _original(self.headers) + tuple((name, text.encode("utf-8", "replace")) for name, text in cause.items())

    def shortened(self, max_bytes: int) -> DeadLetter:
        """Return this letter, cut to a broker's message limit.

        First the end of the value is cut off; if that is not enough, the original headers are removed, then the key.
        """
        letter = replace(self, truncated=True)
        for smaller in (letter, replace(letter, headers=()), replace(letter, headers=(), key=None)):
            room = max_bytes - smaller._num_bytes_without_value()
            if room >= 0:
                return replace(smaller, value=smaller.value and smaller.value[:room])
        return replace(letter, headers=(), key=None, value=letter.value and b"")

    def _num_bytes_without_value(self) -> int:
        headers = sum(len(n.encode("utf-8", "replace")) + len(v) + _HEADER_OVERHEAD_BYTES for n, v in self.to_headers())
        return _RECORD_OVERHEAD_BYTES + len(self.key or b"") + headers

    @classmethod
    def from_message(cls, key: bytes | None, value: bytes | None, headers: Headers) -> DeadLetter:
        """Return the dead letter in a message of a dead-letter topic. Raises `ValueError` if there is none."""
        cause = {name: text.decode("utf-8", "replace") for name, text in headers if name.startswith(HEADER_PREFIX)}
        try:
            return cls(
                topic=cause[TOPIC_HEADER],
                partition=int(cause[PARTITION_HEADER]),
                offset=int(cause[OFFSET_HEADER]),
                value=value,
                key=key,
                headers=_original(headers),
                error_class=cause[ERROR_CLASS_HEADER],
                error_code=cause[ERROR_CODE_HEADER],
                message=cause[MESSAGE_HEADER],
                attempts=int(cause[ATTEMPTS_HEADER]),
                truncated=cause.get(TRUNCATED_HEADER) == "true",
            )
        except KeyError as error:
            raise ValueError(f"not a dead letter: header {error.args[0]} is missing") from None
        except ValueError:
            raise ValueError("not a dead letter: partition, offset and attempts must be numbers") from None


def _original(headers: Headers) -> Headers:
    return tuple((name, value) for name, value in headers if not name.startswith(HEADER_PREFIX))

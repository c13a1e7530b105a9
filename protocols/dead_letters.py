"""The dead letter: a message that can never succeed, with its cause.

Key and value are the original bytes (a null stays null), so a replay is a re-publish and base64 never pushes a message
over the broker's limit; where it came from and why it failed are headers, behind the original ones.
Knows nothing of what made a message fail.
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

#: What the broker counts per message and per header beyond the bytes themselves, rounded up.
_RECORD_OVERHEAD_BYTES = 128
_HEADER_OVERHEAD_BYTES = 10


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message that was given up, as it arrived, and why.

    `truncated` says that value or headers are not whole any more: such a letter can be read but not replayed.
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

        A letter that was replayed and died again keeps only its latest cause.
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
        # "replace", because a message may quote half a surrogate pair and a dead letter must always be publishable.
        return _original(self.headers) + tuple((name, text.encode("utf-8", "replace")) for name, text in cause.items())

    def shortened(self, max_bytes: int) -> DeadLetter:
        """Return this letter cut down to what a broker with this message limit takes.

        The value loses its end; where that is not enough, the original headers go, and then the key.
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
        """Read a message of a dead-letter topic.

        Raises `ValueError` if it is not a dead letter.
        """
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
            raise ValueError(f"not a dead letter: it has no header {error.args[0]}") from None
        except ValueError:
            raise ValueError("not a dead letter: partition, offset and attempts must be numbers") from None


def _original(headers: Headers) -> Headers:
    return tuple((name, value) for name, value in headers if not name.startswith(HEADER_PREFIX))

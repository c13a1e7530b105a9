"""Publishes dead letters again, to the topic they came from, exactly as they first arrived.

Looks only at what was there when it began: a letter that dies again is not met twice. Knows nothing of Kafka.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from protocols.dead_letters import DeadLetter
from protocols.topics import Topics
from workers.ports import Outbox, Outgoing, Record

POLL_S = 0.5
#: Sent and not yet acknowledged; enough to keep the broker busy, and little to hold.
MAX_UNCONFIRMED = 100
PUBLISH_TIMEOUT_S = 60.0


class History(Protocol):
    """Reads a topic from some point on."""

    def poll(self, timeout_s: float) -> list[Record]: ...

    def caught_up(self) -> bool:
        """Whether everything that was there at the beginning has been read."""
        ...


@dataclass(slots=True)
class Replay:
    """What was done with the letters of a dead-letter topic, by error code."""

    replayed: Counter[str] = field(default_factory=Counter)
    #: Not whole any more, so what would be published is not what failed.
    truncated: Counter[str] = field(default_factory=Counter)
    #: Of an error code that was not asked for.
    passed_over: Counter[str] = field(default_factory=Counter)
    beyond_limit: Counter[str] = field(default_factory=Counter)
    #: Not dead letters, or of another topic than this one's.
    foreign: int = 0
    #: Where the next replay begins: behind the youngest letter seen, or at the oldest beyond the limit. Partitions are
    #: not in order with each other, so then some letters may be replayed twice, and none is left out.
    next_since: datetime | None = None


def replay(
    reader: History,
    outbox: Outbox,
    topic: str,
    *,
    codes: Collection[str] = (),
    max_letters: int,
    dry_run: bool = False,
) -> Replay:
    """Publish the letters of `topic` again: at most so many, and where error codes are given only those.

    With `dry_run` nothing is published and the result says what would be. Raises what publishing raises.
    """
    done = Replay()
    unconfirmed: deque[Future[None]] = deque()
    youngest_ms: int | None = None
    oldest_beyond_ms: int | None = None
    while not reader.caught_up():
        for record in reader.poll(POLL_S):
            youngest_ms = max(youngest_ms or 0, record.timestamp_ms)
            letter = _letter_of(record, topic)
            if letter is None:
                done.foreign += 1
            elif codes and letter.error_code not in codes:
                done.passed_over[letter.error_code] += 1
            elif letter.truncated:
                done.truncated[letter.error_code] += 1
            elif done.replayed.total() >= max_letters:
                done.beyond_limit[letter.error_code] += 1
                oldest_beyond_ms = min(oldest_beyond_ms or record.timestamp_ms, record.timestamp_ms)
            else:
                done.replayed[letter.error_code] += 1
                if not dry_run:
                    unconfirmed.append(outbox.send(Outgoing(letter.topic, letter.key, letter.value, letter.headers)))
            while len(unconfirmed) > MAX_UNCONFIRMED:
                unconfirmed.popleft().result(PUBLISH_TIMEOUT_S)
    for future in unconfirmed:
        future.result(PUBLISH_TIMEOUT_S)
    if youngest_ms is not None:
        next_ms = youngest_ms + 1 if oldest_beyond_ms is None else oldest_beyond_ms
        done.next_since = datetime.fromtimestamp(next_ms / 1000, UTC)
    return done


def _letter_of(record: Record, topic: str) -> DeadLetter | None:
    try:
        letter = DeadLetter.from_message(record.key, record.value, record.headers)
    except ValueError:
        return None
    # The header is only what some producer wrote: it must not send messages to any topic it likes.
    return letter if Topics().dead_letter(letter.topic) == topic else None

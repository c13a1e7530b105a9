"""Reads dead letters, and publishes the original messages to the topic they came from, byte for byte.

Reads only the letters that existed at the start, so a message that is dead-lettered again is not read twice.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from protocols.dead_letters import DeadLetter
from protocols.topics import Topics
from workers.ports import Outbox, Outgoing, Record

POLL_S = 0.5
#: Messages sent and not yet acknowledged: enough to keep the broker busy.
MAX_UNCONFIRMED = 100
PUBLISH_TIMEOUT_S = 60.0


class History(Protocol):
    """Reads a topic from a given time on."""

    def poll(self, timeout_s: float) -> list[Record]: ...

    def caught_up(self) -> bool:
        """Whether every record that existed at the start has been read."""
        ...


@dataclass(slots=True)
class Replay:
    """The counts of a replay, by error code."""

    replayed: Counter[str] = field(default_factory=Counter)
    #: Cut letters, whose original message is lost.
    truncated: Counter[str] = field(default_factory=Counter)
    #: Letters with other error codes than the chosen ones.
    passed_over: Counter[str] = field(default_factory=Counter)
    beyond_limit: Counter[str] = field(default_factory=Counter)
    #: Messages that are not dead letters of this topic.
    foreign: int = 0
    #: Start of the next replay: after the newest letter read, or at the oldest letter beyond the limit. Partitions are
    #: not ordered relative to each other, so some letters may be replayed twice, but none is left out.
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
    """Publish at most `max_letters` letters of `topic` again, only those of `codes` if there are any.

    With `dry_run` nothing is published and the result counts what would be. Raises the errors of publishing.
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


def letters_in(reader: History, topic: str, *, codes: Collection[str] = ()) -> Iterator[tuple[Record, DeadLetter]]:
    """Return the letters of `topic` with their records, only those of `codes` if there are any."""
    while not reader.caught_up():
        for record in reader.poll(POLL_S):
            letter = _letter_of(record, topic)
            if letter is not None and (not codes or letter.error_code in codes):
                yield record, letter


def _letter_of(record: Record, topic: str) -> DeadLetter | None:
    try:
        letter = DeadLetter.from_message(record.key, record.value, record.headers)
    except ValueError:
        return None
    # Any producer can write the header, so the header must not choose an arbitrary topic.
    return letter if Topics().dead_letter(letter.topic) == topic else None

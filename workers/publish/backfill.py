"""Publishes a listing of images as fast as the ingest workers process it, and counts the outcome of every row.

Keeps its state in a checkpoint file, from which a stopped or killed run continues. A row that was
published after the last checkpoint is published again, which is harmless. Memory grows with the images in work, not the
length of the listing.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from datetime import datetime
from itertools import islice
from pathlib import Path

from protocols.dead_letters import DeadLetter
from protocols.encoding import EventError, content_type_of, decode
from protocols.events import ImageIndexed, ImageNew
from workers.client import PUBLISH_TIMEOUT_S, Client
from workers.errors import Misconfigured, TooLarge
from workers.publish.listing import BadRow

#: Rows looked up in the store at once.
CHUNK_ROWS = 500
#: Events sent and not yet acknowledged.
MAX_UNCONFIRMED = 512
POLL_S = 0.5
SAVE_EVERY_S = 2.0
#: Most bad rows whose reason is kept.
MAX_NAMED = 5


@dataclass(slots=True)
class Balance:
    """The counts of a backfill: rows = published + stored + duplicates + bad; published = indexed + dead + others."""

    rows: int = 0
    published: int = 0
    stored: int = 0  # already in the store, so not published
    duplicates: int = 0  # rows of an image in work
    bad: int = 0  # rows that name no image
    bad_rows: list[str] = field(default_factory=list)
    indexed: int = 0
    removed: int = 0  # by another producer meanwhile
    too_large: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)  # dead letters published again

    def finished(self) -> int:
        """Return the number of published images with an outcome."""
        return self.indexed + self.removed + self.too_large + self.dead.total()


@dataclass(slots=True)
class Checkpoint:
    """The state of a backfill in a file."""

    listing: str
    saved_at: str  # outcomes before this time are counted
    balance: Balance = field(default_factory=Balance)
    waiting: list[str] = field(default_factory=list)  # ids of published images without an outcome

    @classmethod
    def load(cls, path: Path, listing: str, now: datetime) -> Checkpoint:
        """Return the state in the file, or a new state. Raises `Misconfigured` for the file of another listing."""
        try:
            state = json.loads(path.read_bytes())
            balance = Balance(**state.pop("balance"))
            balance.dead, balance.retried = Counter(balance.dead), Counter(balance.retried)
            found = cls(**state, balance=balance)
            datetime.fromisoformat(found.saved_at)
        except FileNotFoundError:
            return cls(listing, now.isoformat())
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Misconfigured(f"{path} is not a checkpoint of a backfill ({error}): name another --state") from None
        if found.listing != listing:
            raise Misconfigured(
                f"{path} belongs to another listing ({found.listing}): name another --state, or remove it"
            )
        return found

    def save(self, path: Path, now: datetime) -> None:
        """Write the state: a temporary file, then a rename."""
        self.saved_at = now.isoformat()
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        balance = {each.name: getattr(self.balance, each.name) for each in fields(self.balance)}
        state = {"listing": self.listing, "saved_at": self.saved_at, "waiting": self.waiting, "balance": balance}
        with temporary.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@dataclass(slots=True)
class FailedIds:
    """The ids of failed images in a file beside the checkpoint, one JSON text per line."""

    path: Path

    def read(self) -> set[str]:
        """Return the ids; an empty set if there is no file."""
        try:
            with self.path.open(encoding="utf-8") as file:
                return {json.loads(line) for line in file if line.endswith("\n")}  # a kill may cut the last line
        except FileNotFoundError:
            return set()
        except (OSError, ValueError) as error:
            raise Misconfigured(f"{self.path}: {error}") from None

    def append(self, image_id: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(image_id)}\n")

    def replace(self, ids: Iterable[str]) -> None:
        """Replace all ids in the file by these."""
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(f"{json.dumps(image_id)}\n" for image_id in ids), encoding="utf-8")
        temporary.replace(self.path)


class Backfill:
    """Publishes images and counts their outcomes."""

    def __init__(
        self,
        client: Client,
        checkpoint: Checkpoint,
        *,
        are_stored: Callable[[Sequence[str]], list[bool]],
        max_in_work: int,
        save: Callable[[], None],
        note_failed: Callable[[str], None],
        on_progress: Callable[[Balance, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`are_stored` looks image ids up in the store; `note_failed` takes the id of each dead-lettered image.

        `on_progress` is called with the counts and the number of images in work.
        """
        self._client = client
        self._checkpoint = checkpoint
        self._balance = checkpoint.balance
        self._are_stored = are_stored
        self._max_in_work = max_in_work
        self._save = save
        self._note_failed = note_failed
        self._on_progress = on_progress
        self._clock = clock
        self._saved_at = clock()
        self._unconfirmed: deque[tuple[str, Future[None]]] = deque()
        for image_id in checkpoint.waiting:
            client.watch_image(image_id)

    def publish(self, rows: Iterable[ImageNew | BadRow]) -> None:
        """Publish the rows that are not in the store, then wait for every outcome."""
        iterator = iter(rows)
        while chunk := list(islice(iterator, CHUNK_ROWS)):
            images = list(self._images_in(chunk))
            for image, is_stored in zip(images, self._are_stored([image.image_id for image in images]), strict=True):
                if is_stored:
                    self._balance.stored += 1
                elif self._client.watches(image.image_id):
                    self._balance.duplicates += 1
                else:
                    self._send(image)
                    self._balance.published += 1
            self._confirm_all()
            self._balance.rows += len(chunk)
            self._turn(0.0)
            self._save_if_due()  # only here do the counts add up
        self.wait()

    def retry(self, letters: Iterable[DeadLetter], failed: Collection[str]) -> None:
        """Publish the dead letters of the failed images again, then wait for every outcome."""
        left = set(failed)
        for letter in letters:
            try:
                image = decode(ImageNew, letter.value, content_type_of(letter.headers))
            except EventError:
                continue
            if letter.truncated or image.image_id not in left or not self._balance.dead[letter.error_code]:
                continue
            left.discard(image.image_id)
            self._balance.dead[letter.error_code] -= 1
            self._balance.retried[letter.error_code] += 1
            self._send(image)
            self._confirm_all()
            self._turn(0.0)
            self._save_if_due()
        self.wait()

    def wait(self) -> None:
        """Wait until every published image has its outcome."""
        self._confirm_all()
        while self._client.num_outstanding_images:
            self._turn(POLL_S)
            self._save_if_due()
        self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        self._checkpoint.waiting = sorted(self._client.outstanding_images)
        self._save()
        self._saved_at = self._clock()

    def _images_in(self, chunk: Sequence[ImageNew | BadRow]) -> Iterator[ImageNew]:
        for row in chunk:
            if isinstance(row, ImageNew):
                yield row
                continue
            self._balance.bad += 1
            if len(self._balance.bad_rows) < MAX_NAMED:
                self._balance.bad_rows.append(f"row {row.number}: {row.reason}")

    def _send(self, image: ImageNew) -> None:
        while self._client.num_outstanding_images >= self._max_in_work:
            self._confirm_all()
            self._turn(POLL_S)
        self._unconfirmed.append((image.image_id, self._client.publish_image(image)))
        if len(self._unconfirmed) > MAX_UNCONFIRMED:
            self._confirm()

    def _confirm_all(self) -> None:
        while self._unconfirmed:
            self._confirm()

    def _confirm(self) -> None:
        image_id, sent = self._unconfirmed.popleft()
        try:
            sent.result(PUBLISH_TIMEOUT_S)
        except TooLarge:
            self._client.forget_image(image_id)
            self._balance.too_large += 1

    def _turn(self, timeout_s: float) -> None:
        for outcome in self._client.image_outcomes(timeout_s):
            if isinstance(outcome, DeadLetter):
                self._balance.dead[outcome.error_code] += 1
                self._note_failed((outcome.key or b"").decode("utf-8", "replace"))
            elif isinstance(outcome, ImageIndexed):
                self._balance.indexed += 1
            else:
                self._balance.removed += 1
        self._on_progress(self._balance, self._client.num_outstanding_images)

    def _save_if_due(self) -> None:
        if self._clock() - self._saved_at >= SAVE_EVERY_S:
            self.save()

"""The command `backfill`: publishes a listing of images and reports the outcome of every row."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from protocols.blob import blob_keys
from protocols.dead_letters import DeadLetter
from protocols.topics import Topics
from workers.bus.producer import KafkaOutbox
from workers.bus.reader import KafkaReader, Start
from workers.client import MAX_MESSAGE_BYTES, Client, answer_topics
from workers.publish.backfill import Backfill, Balance, Checkpoint, FailedIds
from workers.publish.command import (
    Brokers,
    ImagesPrefix,
    connection,
    failing_with_a_sentence,
    progress_bars,
    topics_of,
)
from workers.publish.listing import fingerprint_of, rows_of
from workers.publish.output import print_balance, remarks
from workers.publish.replay import letters_in
from workers.store.client import RedisStore

#: Outcomes are read again from this long before the last checkpoint, because clocks differ.
CLOCK_TOLERANCE = timedelta(minutes=5)
#: A remark is printed after this time without an outcome.
SILENCE_S = 60.0


def backfill(
    source: Annotated[
        str, typer.Argument(help="A folder, s3:// or gs:// prefix, or a CSV or Parquet file of addresses.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model digest: skip images that the store at REDIS_URL has for this model.")
    ] = None,
    state: Annotated[Path, typer.Option(help="Checkpoint file, to continue after an interruption.")] = Path(
        "backfill.json"
    ),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Publish the dead letters of this backfill again.")
    ] = False,
    prefix: Annotated[str, typer.Option(help="Prefix of every image id.")] = "",
    keep_extension: Annotated[bool, typer.Option("--keep-extension", help="Image ids keep .jpg and the like.")] = False,
    max_in_work: Annotated[int, typer.Option(min=1, help="Most published images without an outcome.")] = 10_000,
    redis_url: Annotated[
        str, typer.Option(envvar="REDIS_URL", help="The token store, with --model.")
    ] = "redis://localhost:6379/0",
    brokers: Brokers = None,
    topic_prefix: ImagesPrefix = "",
) -> None:
    """Publish the images of a listing as fast as they are indexed, and report the outcome of every row."""
    topics = topics_of(topic_prefix)
    now = datetime.now(UTC)
    with failing_with_a_sentence(), _stored(redis_url, model) as are_stored:
        listing = f"{fingerprint_of(source)}, prefix {prefix!r}, extensions {keep_extension}"
        checkpoint = Checkpoint.load(state, listing, now)
        options = connection(brokers)
        # Outcomes since the last save count only for images that wait for one. Without any, an old dead letter must not
        # be taken for the outcome of an image that is published again.
        since = datetime.fromisoformat(checkpoint.saved_at) - CLOCK_TOLERANCE
        start: Start = since if checkpoint.waiting else "end"
        reader = KafkaReader(options, answer_topics(topics)[:2], start=start, max_message_bytes=MAX_MESSAGE_BYTES)
        failed = FailedIds(state.with_name(f"{state.name}.failed"))
        failed_again: list[str] = []
        client = Client(KafkaOutbox(options, max_message_bytes=MAX_MESSAGE_BYTES, linger_ms=5), reader, topics)
        with client, progress_bars() as bars:
            task = bars.add_task("finished", total=None)
            backfill = Backfill(
                client,
                checkpoint,
                are_stored=are_stored,
                max_in_work=max_in_work,
                save=lambda: checkpoint.save(state, datetime.now(UTC)),
                note_failed=failed_again.append if retry_failed else failed.append,
                on_progress=_Progress(lambda balance: bars.update(task, completed=balance.finished())),
            )
            try:
                if retry_failed:
                    backfill.retry(_letters(options, topics), failed.read())
                    failed.replace(failed_again)
                else:
                    skip = checkpoint.balance.rows
                    backfill.publish(rows_of(source, skip=skip, id_prefix=prefix, keep_extension=keep_extension))
            except KeyboardInterrupt:
                remarks.print(f"interrupted; the same command continues with {state}")
                raise typer.Exit(130) from None
    if not print_balance(checkpoint.balance, state):
        raise typer.Exit(1)


class _Progress:
    """Updates the bar, and prints a remark when no outcome arrives."""

    def __init__(self, update: Callable[[Balance], None]) -> None:
        self._update = update
        self._finished = -1
        self._changed_at = time.monotonic()

    def __call__(self, balance: Balance, num_in_work: int) -> None:
        now = time.monotonic()
        if balance.finished() != self._finished or not num_in_work:
            self._finished, self._changed_at = balance.finished(), now
        elif now - self._changed_at >= SILENCE_S:
            self._changed_at = now
            remarks.print(
                f"no outcome for {SILENCE_S:g} s, {num_in_work} images in work; is the ingest worker running and "
                "ready, with this topic prefix? It retries unreachable images for minutes."
            )
        self._update(balance)


@contextlib.contextmanager
def _stored(redis_url: str, model: str | None) -> Iterator[Callable[[Sequence[str]], list[bool]]]:
    """Return a function that looks image ids up in the store; without a model it finds none."""
    if model is None:
        yield lambda image_ids: [False] * len(image_ids)
        return
    store = RedisStore(redis_url)
    try:
        store.probe([f"vt:{model}:"], writes=False)
        yield lambda image_ids: store.exist_many(blob_keys(model, image_ids))
    finally:
        store.close()


def _letters(options: dict[str, object], topics: Topics) -> Iterator[DeadLetter]:
    topic = topics.dead_letter(topics.images_new)
    reader = KafkaReader(options, [topic], start="beginning", max_message_bytes=MAX_MESSAGE_BYTES)
    try:
        yield from (letter for _, letter in letters_in(reader, topic))
    finally:
        reader.close()

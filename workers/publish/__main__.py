"""`python -m workers.publish`: publishes images, removals and requests, and shows and replays dead letters.

Connects to Kafka with the workers' settings (KAFKA_BROKERS and the other KAFKA_*). Results go to standard output,
everything else to standard error. The exit status is 0, 1 after a failure with an error message, or 2 after a misuse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from protocols.events import ImageNew
from protocols.topics import Topics
from workers.bus.producer import KafkaOutbox
from workers.bus.reader import KafkaReader, Start
from workers.client import CLOSE_TIMEOUT_S, MAX_MESSAGE_BYTES, connect
from workers.errors import Misconfigured
from workers.publish.backfill_command import backfill
from workers.publish.command import (
    TIME_FORMATS,
    Brokers,
    ImagesPrefix,
    MaxMessageBytes,
    Patience,
    Wait,
    connection,
    failing_with_a_sentence,
    misuse,
    progress_bars,
    topics_of,
)
from workers.publish.image_files import AmbiguousName, Refused, image_events, image_files, printable
from workers.publish.image_upload import Upload, upload
from workers.publish.output import print_letter, print_replay, print_upload, remarks
from workers.publish.query import query, search_images
from workers.publish.query_input import image_ids_of
from workers.publish.replay import letters_in, replay
from workers.publish.requests import publish_requests

app = typer.Typer(
    help="Publish images, removals and rerank requests; show and replay dead letters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

#: The bytes of a message in addition to the image: ids, headers and framing.
EVENT_OVERHEAD_BYTES = 4_096

app.command("backfill")(backfill)
app.command("query")(query)
app.command("search")(search_images)
app.command("requests")(publish_requests)

DeadLetterTopic = Annotated[str, typer.Argument(help="The dead-letter topic, such as images.new.dlq.")]
Codes = Annotated[
    list[str] | None, typer.Option("--code", help="Only dead letters with this error code; may be repeated.")
]
Since = Annotated[
    datetime | None, typer.Option("--since", help="Only dead letters since this time.", formats=TIME_FORMATS)
]


@app.command("images")
def publish_images(
    paths: Annotated[list[Path], typer.Argument(exists=True, help="Folders with images, or image files.")],
    brokers: Brokers = None,
    topic_prefix: ImagesPrefix = "",
    source: Annotated[
        Literal["uri", "data"], typer.Option("--as", help="uri: the address of the file; data: its bytes in the event.")
    ] = "uri",
    prefix: Annotated[str, typer.Option(help="Prefix of every image id.")] = "",
    keep_extension: Annotated[bool, typer.Option("--keep-extension", help="Image ids keep .jpg and the like.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Publish at most this many images, in the order of their ids.")
    ] = None,
    wait: Wait = False,
    timeout_s: Patience = 60.0,
    max_message_bytes: MaxMessageBytes = MAX_MESSAGE_BYTES,
) -> None:
    """Publish image files to images.new; the image id is the path below the folder, without the extension."""
    try:
        files = image_files(paths, id_prefix=prefix, keep_extension=keep_extension)[:limit]
    except AmbiguousName as error:
        misuse(f"{error}; use --keep-extension")
    if not files:
        misuse(f"no image files in {', '.join(map(printable, paths))}")
    if source == "uri":
        roots = ",".join(sorted({printable((path if path.is_dir() else path.parent).resolve()) for path in paths}))
        remarks.print(
            "the events carry file addresses, which an ingest worker reads only on a machine with these files and "
            f"with INGEST_ALLOWED_SCHEMES=https,http,file and INGEST_FILE_ROOTS={roots}; --as data sends the bytes"
        )
    refused: list[Refused] = []
    max_data_bytes = max(1, max_message_bytes - EVENT_OVERHEAD_BYTES)

    def events() -> Iterator[ImageNew]:
        for event in image_events(files, source, max_data_bytes=max_data_bytes):
            if isinstance(event, Refused):
                refused.append(event)
            else:
                yield event

    result = _upload(events(), len(files), topic_prefix, brokers, max_message_bytes, wait=wait, patience_s=timeout_s)
    if not print_upload(result, refused, wait=wait, patience_s=timeout_s):
        raise typer.Exit(1)


@app.command("delete")
def delete_images(
    image_ids: Annotated[list[str] | None, typer.Argument(help="Ids of the images; else lines of --ids-file.")] = None,
    ids_file: Annotated[typer.FileText | None, typer.Option(help="One image id per line; - is standard input.")] = None,
    brokers: Brokers = None,
    topic_prefix: ImagesPrefix = "",
    wait: Wait = False,
    timeout_s: Patience = 60.0,
) -> None:
    """Remove images from the store, the index and every slab: publish a null value for each to images.new."""
    try:
        ids = image_ids_of([*(image_ids or ()), *(ids_file or ())])
    except ValueError as error:
        misuse(str(error))
    if not ids:
        misuse("no image ids: give some, or --ids-file")
    result = _upload(ids, len(ids), topic_prefix, brokers, MAX_MESSAGE_BYTES, wait=wait, patience_s=timeout_s)
    if not print_upload(result, (), wait=wait, patience_s=timeout_s, removal=True):
        raise typer.Exit(1)


@app.command("dead-letters")
def show_dead_letters(
    topic: DeadLetterTopic,
    code: Codes = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, with whole values.")] = False,
    brokers: Brokers = None,
    max_message_bytes: MaxMessageBytes = MAX_MESSAGE_BYTES,
) -> None:
    """Show dead letters, the oldest of each partition first: origin, cause and value."""
    _check_dead_letter_topic(topic)
    num_shown = num_more = 0
    with failing_with_a_sentence(), _dead_letters(topic, brokers, since, max_message_bytes) as reader:
        for record, letter in letters_in(reader, topic, codes=code or ()):
            if num_shown < limit:
                print_letter(record, letter, as_json=as_json)
                num_shown += 1
            else:
                num_more += 1
    if num_more:
        remarks.print(f"{num_more} more; select with --limit, --code and --since")
    elif not num_shown:
        remarks.print("no dead letters")


@app.command("replay-dead-letters")
def replay_dead_letters(
    topic: DeadLetterTopic,
    code: Codes = None,
    since: Since = None,
    max_letters: Annotated[int, typer.Option(min=1, help="Publish at most this many.")] = 1_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be published.")] = False,
    brokers: Brokers = None,
    max_message_bytes: MaxMessageBytes = MAX_MESSAGE_BYTES,
) -> None:
    """Publish dead letters to the topic they came from, byte for byte; cut dead letters are left out."""
    _check_dead_letter_topic(topic)
    with failing_with_a_sentence(), _dead_letters(topic, brokers, since, max_message_bytes) as reader:
        outbox = KafkaOutbox(connection(brokers), max_message_bytes=max_message_bytes)
        try:
            done = replay(reader, outbox, topic, codes=code or (), max_letters=max_letters, dry_run=dry_run)
        finally:
            outbox.close(CLOSE_TIMEOUT_S)
    print_replay(done, dry_run=dry_run)


def _upload(
    images: Iterator[ImageNew] | list[str],
    number: int,
    topic_prefix: str,
    brokers: str | None,
    max_message_bytes: int,
    *,
    wait: bool,
    patience_s: float,
) -> Upload:
    """Publish images or removals with a progress bar."""
    topics = topics_of(topic_prefix)
    answers = [topics.images_indexed, topics.dead_letter(topics.images_new)]
    with (
        failing_with_a_sentence(),
        connect(connection(brokers), topics, read=answers, max_message_bytes=max_message_bytes) as client,
        progress_bars() as bars,
    ):
        published = bars.add_task("published", total=number)
        finished = bars.add_task("finished", total=number, visible=wait)

        def show(now: Upload) -> None:
            bars.update(published, completed=now.published)
            bars.update(finished, completed=now.indexed + now.removed + now.dead.total())

        return upload(client, images, wait=wait, patience_s=patience_s, on_progress=show)


def _check_dead_letter_topic(topic: str) -> None:
    suffix = Topics().dead_letter("")
    if not topic.endswith(suffix):
        misuse(f"{topic} is not a dead-letter topic: their names end in {suffix}")


@contextlib.contextmanager
def _dead_letters(
    topic: str, brokers: str | None, since: datetime | None, max_message_bytes: int
) -> Iterator[KafkaReader]:
    """Open a reader of a dead-letter topic. Raises `Misconfigured` if the topic does not exist."""
    start: Start = since.astimezone() if since is not None else "beginning"
    reader = KafkaReader(connection(brokers), [topic], start=start, max_message_bytes=max_message_bytes)
    try:
        if reader.unknown_topics():
            raise Misconfigured(f"the topic {topic} does not exist")
        yield reader
    finally:
        reader.close()


if __name__ == "__main__":
    app()

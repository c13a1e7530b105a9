"""`python -m workers.publish`: images and requests from the command line, and dead letters published again.

Reaches Kafka as the workers do (KAFKA_BROKERS and the other KAFKA_* settings). Results go to standard output,
everything else to standard error. Ends with 0, with 1 and a sentence if something failed, with 2 if the command makes
no sense.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from protocols.events import ImageNew
from protocols.topics import Topics
from workers.bus.connection import kafka_connection
from workers.bus.producer import KafkaOutbox
from workers.bus.reader import KafkaReader, Start
from workers.client import CLOSE_TIMEOUT_S, MAX_MESSAGE_BYTES, connect
from workers.errors import Misconfigured, WorkerError
from workers.logs import set_up_logs
from workers.publish.image_files import AmbiguousName, Refused, image_events, image_files, printable
from workers.publish.image_upload import Upload, upload
from workers.publish.output import print_replay, print_reply, print_search, print_upload, remarks
from workers.publish.query_input import candidates_of, request_of
from workers.publish.replay import replay
from workers.publish.search import filters_of, search
from workers.read_settings import near_misses, read_settings, secrets_of
from workers.settings import KafkaSettings

app = typer.Typer(
    help="Publish images and rerank requests; publish dead letters again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

#: What the broker counts beyond the image itself: ids, headers and framing.
EVENT_OVERHEAD_BYTES = 4_096
#: Somebody sits in front of it: an address where nothing answers is told sooner than to a worker.
BOOTSTRAP_TIMEOUT_MS = 10_000
TIME_FORMATS = ["%Y-%m-%dT%H:%M:%S.%f%z", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"]

Brokers = Annotated[str | None, typer.Option(help="Brokers to begin with, host:port,...; else KAFKA_BROKERS.")]
MaxMessageBytes = Annotated[int, typer.Option(min=1, help="Largest message to publish, as the broker allows.")]


@app.command("images")
def publish_images(
    paths: Annotated[list[Path], typer.Argument(exists=True, help="Folders with images, or image files.")],
    brokers: Brokers = None,
    topic_prefix: Annotated[str, typer.Option(envvar="INGEST_TOPIC_PREFIX", help="In front of topic names.")] = "",
    source: Annotated[
        Literal["uri", "data"], typer.Option("--as", help="uri: where the file is; data: its bytes in the event.")
    ] = "uri",
    prefix: Annotated[str, typer.Option(help="Put in front of every image id.")] = "",
    keep_extension: Annotated[bool, typer.Option("--keep-extension", help="Image ids keep .jpg and the like.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many, in the order of their ids.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until each image is indexed or dead.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0, help="With --wait: give up after so long without news.")] = 60.0,
    max_message_bytes: MaxMessageBytes = MAX_MESSAGE_BYTES,
) -> None:
    """Publish image files to images.new; the image id is the path below the folder, without the extension."""
    try:
        files = image_files(paths, id_prefix=prefix, keep_extension=keep_extension)[:limit]
    except AmbiguousName as error:
        misuse(f"{error}; use --keep-extension")
    if not files:
        misuse(f"no image files in {', '.join(map(printable, paths))}")
    topics = topics_of(topic_prefix)
    refused: list[Refused] = []
    max_data_bytes = max(1, max_message_bytes - EVENT_OVERHEAD_BYTES)

    def events() -> Iterator[ImageNew]:
        for event in image_events(files, source, max_data_bytes=max_data_bytes):
            if isinstance(event, Refused):
                refused.append(event)
            else:
                yield event

    answers = [topics.images_indexed, topics.dead_letter(topics.images_new)]
    with (
        failing_with_a_sentence(),
        connect(connection(brokers), topics, read=answers, max_message_bytes=max_message_bytes) as client,
        progress_bars() as bars,
    ):
        published = bars.add_task("published", total=len(files))
        finished = bars.add_task("indexed", total=len(files), visible=wait)

        def show(now: Upload) -> None:
            bars.update(published, completed=now.published)
            bars.update(finished, completed=now.indexed, total=len(files) - len(refused) - len(now.too_large))

        result = upload(client, events(), wait=wait, patience_s=timeout_s, on_progress=show)
    if not print_upload(result, refused, wait=wait, patience_s=timeout_s):
        raise typer.Exit(1)


@app.command("query")
def query(
    text: Annotated[str | None, typer.Argument(help="The query; leave out with --image.")] = None,
    image: Annotated[str | None, typer.Option(help="Image id to rank texts for.")] = None,
    candidates: Annotated[str | None, typer.Option(help="Image ids, separated by commas.")] = None,
    texts: Annotated[list[str] | None, typer.Option(help="With --image: a text to rank; once for each.")] = None,
    candidates_file: Annotated[
        typer.FileText | None,
        typer.Option(help="A candidate a line, and behind a tab its first-stage score; else standard input."),
    ] = None,
    top_n: Annotated[int | None, typer.Option(min=1, help="Results to return; else all.")] = None,
    deadline_ms: Annotated[int | None, typer.Option(min=1, help="From now; later the answer is `expired`.")] = None,
    priority: Annotated[int, typer.Option(min=0, max=9, help="Higher goes first.")] = 0,
    reply_topic: Annotated[str | None, typer.Option(help="Where to be answered, if the worker allows it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the response event as it is.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0, help="Longest wait for the reply.")] = 30.0,
    brokers: Brokers = None,
    topic_prefix: Annotated[str, typer.Option(envvar="RERANK_TOPIC_PREFIX", help="In front of topic names.")] = "",
    max_message_bytes: MaxMessageBytes = MAX_MESSAGE_BYTES,
) -> None:
    """Publish one request and print its reply: images for a text, or with --image texts for an image."""
    topics = topics_of(topic_prefix)
    lines = candidates_file or (None if sys.stdin.isatty() else sys.stdin)
    try:
        request = request_of(
            text,
            image,
            candidates_of(candidates, texts or (), lines, for_image=image is not None),
            top_n=top_n,
            deadline_ms=deadline_ms,
            priority=priority,
            reply_topic=reply_topic,
        )
    except ValueError as error:
        misuse(str(error))
    # A reply topic that the worker does not allow is told on the usual one.
    answers = list(dict.fromkeys([topics.rerank_responses, reply_topic or topics.rerank_responses]))
    with (
        failing_with_a_sentence(),
        connect(connection(brokers), topics, read=answers, max_message_bytes=max_message_bytes) as client,
    ):
        reply = client.rerank(request, timeout_s)
    if not print_reply(reply, request, as_json=as_json):
        raise typer.Exit(1)


@app.command("search")
def search_pictures(
    text: Annotated[str, typer.Argument(help="What the pictures are to show.")],
    gateway: Annotated[str, typer.Option(envvar="GATEWAY_URL", help="Address of a gateway.")] = "http://127.0.0.1:8000",
    top_n: Annotated[int, typer.Option(min=1, max=1_000, help="Pictures to show.")] = 10,
    candidates: Annotated[int, typer.Option(min=1, max=1_000, help="Pictures of the index that are ranked.")] = 50,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="Metadata that a picture must have, key=value; repeatable.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="GATEWAY_KEY", help="API key, if the gateway needs one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as it is.")] = False,
) -> None:
    """Search the pictures behind a gateway, as its page does."""
    try:
        conditions = filters_of(filters or ())
    except ValueError as error:
        misuse(str(error))
    with failing_with_a_sentence():
        answer = search(gateway, text, top_n=top_n, candidates=candidates, filters=conditions, key=key)
    print_search(answer, as_json=as_json)


@app.command("replay-dead-letters")
def replay_dead_letters(
    topic: Annotated[str, typer.Argument(help="The dead-letter topic, such as images.new.dlq.")],
    code: Annotated[list[str] | None, typer.Option(help="Only letters of this error code; may be repeated.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Only letters not older.", formats=TIME_FORMATS)] = None,
    max_letters: Annotated[int, typer.Option(min=1, help="Publish at most so many.")] = 1_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be published.")] = False,
    brokers: Brokers = None,
    max_message_bytes: MaxMessageBytes = MAX_MESSAGE_BYTES,
) -> None:
    """Publish dead letters to the topic they came from, byte by byte as they were; never those that were cut."""
    if not topic.endswith(Topics().dead_letter("")):
        misuse(f"{topic} is not a dead-letter topic: its name would end in {Topics().dead_letter('')}")
    with failing_with_a_sentence():
        settings = connection(brokers)
        start: Start = since.astimezone() if since is not None else "beginning"
        reader = KafkaReader(settings, [topic], start=start, max_message_bytes=max_message_bytes)
        try:
            if reader.unknown_topics():
                raise Misconfigured(f"there is no topic {topic}")
            outbox = KafkaOutbox(settings, max_message_bytes=max_message_bytes)
            try:
                done = replay(reader, outbox, topic, codes=code or (), max_letters=max_letters, dry_run=dry_run)
            finally:
                outbox.close(CLOSE_TIMEOUT_S)
        finally:
            reader.close()
    print_replay(done, dry_run=dry_run)


def connection(brokers: str | None) -> dict[str, Any]:
    """What a Kafka client needs, from the settings; `--brokers` counts more than KAFKA_BROKERS."""
    settings = read_settings(KafkaSettings)
    set_up_logs(log_format="console", level="warning", secrets=secrets_of(settings))
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # its retries are not news; what fails is told as a sentence
    for sentence in near_misses(KafkaSettings):
        remarks.print(sentence)
    if brokers is not None:
        named = tuple(word.strip() for word in brokers.split(",") if word.strip())
        settings = settings.model_copy(update={"kafka_brokers": named})
    return kafka_connection(settings, "edje-publish") | {"bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS}


def topics_of(prefix: str) -> Topics:
    try:
        return Topics(prefix)
    except ValueError as error:
        misuse(str(error))


@contextmanager
def failing_with_a_sentence() -> Iterator[None]:
    try:
        yield
    except (WorkerError, TimeoutError) as error:
        remarks.print(str(error) or "Kafka has not taken a message in time")
        raise typer.Exit(1) from None


def progress_bars() -> Progress:
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=remarks)


def misuse(sentence: str) -> NoReturn:
    raise typer.BadParameter(sentence)


if __name__ == "__main__":
    app()

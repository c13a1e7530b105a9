"""The common parts of the commands: options, the connection to Kafka, error messages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from protocols.topics import Topics
from workers.bus.connection import kafka_connection
from workers.errors import WorkerError
from workers.logs import set_up_logs
from workers.publish.output import remarks
from workers.read_settings import near_misses, read_settings, secrets_of
from workers.settings import KafkaSettings

#: Shorter than a worker's timeout, because a person waits for the command.
BOOTSTRAP_TIMEOUT_MS = 10_000
TIME_FORMATS = ["%Y-%m-%dT%H:%M:%S.%f%z", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"]

Brokers = Annotated[str | None, typer.Option(help="Addresses of some brokers, host:port,...; default: KAFKA_BROKERS.")]
MaxMessageBytes = Annotated[int, typer.Option(min=1, help="Largest message to publish, at most the broker's limit.")]
ImagesPrefix = Annotated[
    str, typer.Option("--topic-prefix", envvar="INGEST_TOPIC_PREFIX", help="Prefix of topic names.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until each image has its outcome.")]
Patience = Annotated[
    float, typer.Option("--timeout-s", min=0, help="With --wait: seconds without an outcome before giving up.")
]


def connection(brokers: str | None) -> dict[str, Any]:
    """Return the options of a Kafka client from the settings; `brokers` overrides KAFKA_BROKERS."""
    settings = read_settings(KafkaSettings)
    set_up_logs(log_format="console", level="warning", secrets=secrets_of(settings))
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # a failure is reported as one sentence
    for sentence in near_misses(KafkaSettings):
        remarks.print(sentence)
    if brokers is not None:
        named = tuple(word.strip() for word in brokers.split(",") if word.strip())
        settings = settings.model_copy(update={"kafka_brokers": named})
    return kafka_connection(settings, "edje-publish") | {"bootstrap_timeout_ms": BOOTSTRAP_TIMEOUT_MS}


def topics_of(prefix: str) -> Topics:
    """Return the topics with this prefix; an invalid prefix ends the command with status 2."""
    try:
        return Topics(prefix)
    except ValueError as error:
        misuse(str(error))


@contextmanager
def failing_with_a_sentence() -> Iterator[None]:
    """Print a `WorkerError` as one sentence and end the command with status 1."""
    try:
        yield
    except (WorkerError, TimeoutError) as error:
        remarks.print(str(error) or "Kafka has not accepted a message in time")
        raise typer.Exit(1) from None


def progress_bars() -> Progress:
    """Return progress bars on standard error."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=remarks)


def misuse(sentence: str) -> NoReturn:
    """End the command with status 2 and this sentence."""
    raise typer.BadParameter(sentence)

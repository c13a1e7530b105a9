"""The command `requests`: publishes a file of rerank requests and prints the replies in the order of the requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Annotated, Protocol

import typer

from protocols.encoding import EventError, decode, encode
from protocols.events import RerankRequest, RerankResponse
from workers.client import MAX_MESSAGE_BYTES, Reply, connect
from workers.publish.command import (
    Brokers,
    MaxMessageBytes,
    connection,
    failing_with_a_sentence,
    misuse,
    topics_of,
)


class Client(Protocol):
    """The part of the client that is used here."""

    def publish_request(self, request: RerankRequest) -> object: ...

    def reply_to(self, request_id: str, timeout_s: float) -> Reply: ...


def publish_requests(
    requests: Annotated[
        typer.FileText, typer.Argument(help="File of request events as JSON lines; - is standard input.")
    ],
    concurrency: Annotated[
        int, typer.Option(min=1, max=1000, help="Most requests that wait for a reply at one time.")
    ] = 32,
    timeout_s: Annotated[float, typer.Option(min=0, help="Longest wait for the next reply.")] = 30.0,
    brokers: Brokers = None,
    topic_prefix: Annotated[str, typer.Option(envvar="RERANK_TOPIC_PREFIX", help="Prefix of topic names.")] = "",
    max_message_bytes: MaxMessageBytes = MAX_MESSAGE_BYTES,
) -> None:
    """Publish request events and print each reply event as a line of JSON, in the order of the requests."""
    topics = topics_of(topic_prefix)
    try:
        events = requests_in(requests)
    except ValueError as error:
        misuse(str(error))
    with (
        failing_with_a_sentence(),
        connect(
            connection(brokers), topics, read=[topics.rerank_responses], max_message_bytes=max_message_bytes
        ) as client,
    ):
        for response in replies_to(client, events, concurrency, timeout_s):
            typer.echo(encode(response).decode())


def requests_in(lines: Iterable[str]) -> list[RerankRequest]:
    """Return the requests, one per line without empty lines. Raises `ValueError` with the line number."""
    events = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                events.append(decode(RerankRequest, line.encode(errors="surrogatepass")))
            except EventError as error:
                raise ValueError(f"line {number}: {error}") from error
    if len({event.request_id for event in events}) < len(events):
        raise ValueError("two requests have the same request_id, so their replies could not be distinguished")
    return events


def replies_to(
    client: Client, events: Iterable[RerankRequest], concurrency: int, timeout_s: float
) -> Iterator[RerankResponse]:
    """Yield the responses in the order of the requests, at most `concurrency` outstanding. Raises `NoAnswer`."""
    waiting: deque[str] = deque()
    for event in events:
        if len(waiting) == concurrency:
            yield client.reply_to(waiting.popleft(), timeout_s).response
        client.publish_request(event)
        waiting.append(event.request_id)
    while waiting:
        yield client.reply_to(waiting.popleft(), timeout_s).response

"""The commands that send a query: `query` over Kafka, `search` over a gateway."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from workers.client import MAX_MESSAGE_BYTES, connect
from workers.publish.command import (
    Brokers,
    MaxMessageBytes,
    connection,
    failing_with_a_sentence,
    misuse,
    topics_of,
)
from workers.publish.output import print_reply, print_search
from workers.publish.query_input import candidates_of, request_of
from workers.publish.search import filters_of, search


def query(
    text: Annotated[str | None, typer.Argument(help="The query; omit with --image.")] = None,
    image: Annotated[str | None, typer.Option(help="Image id to rank texts for.")] = None,
    candidates: Annotated[str | None, typer.Option(help="Image ids, separated by commas.")] = None,
    texts: Annotated[list[str] | None, typer.Option(help="With --image: a text to rank; repeat for each text.")] = None,
    candidates_file: Annotated[
        typer.FileText | None,
        typer.Option(
            help="File with one candidate per line, optionally a tab and a first-stage score; default: standard input."
        ),
    ] = None,
    top_n: Annotated[int | None, typer.Option(min=1, help="Results to return; default: all.")] = None,
    deadline_ms: Annotated[
        int | None, typer.Option(min=1, help="Milliseconds from now after which the request expires.")
    ] = None,
    priority: Annotated[int, typer.Option(min=0, max=9, help="Requests with a higher priority go first.")] = 0,
    reply_topic: Annotated[str | None, typer.Option(help="Topic of the reply, if the worker allows it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the response event.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0, help="Longest wait for the reply.")] = 30.0,
    brokers: Brokers = None,
    topic_prefix: Annotated[str, typer.Option(envvar="RERANK_TOPIC_PREFIX", help="Prefix of topic names.")] = "",
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
    # The error about a reply topic that is not allowed arrives on the default topic.
    answers = list(dict.fromkeys([topics.rerank_responses, reply_topic or topics.rerank_responses]))
    with (
        failing_with_a_sentence(),
        connect(connection(brokers), topics, read=answers, max_message_bytes=max_message_bytes) as client,
    ):
        reply = client.rerank(request, timeout_s)
    if not print_reply(reply, request, as_json=as_json):
        raise typer.Exit(1)


def search_images(
    text: Annotated[str, typer.Argument(help="Description of the wanted images.")],
    gateway: Annotated[str, typer.Option(envvar="GATEWAY_URL", help="Address of a gateway.")] = "http://127.0.0.1:8000",
    top_n: Annotated[int, typer.Option(min=1, max=1_000, help="Images to show.")] = 10,
    candidates: Annotated[int, typer.Option(min=1, max=1_000, help="Images taken from the index to be ranked.")] = 50,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="Metadata that an image must have, key=value; may be repeated.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="GATEWAY_KEY", help="API key, if the gateway needs one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer of the gateway.")] = False,
) -> None:
    """Search the images of a gateway, as its page does."""
    try:
        conditions = filters_of(filters or ())
    except ValueError as error:
        misuse(str(error))
    with failing_with_a_sentence():
        answer = search(gateway, text, top_n=top_n, candidates=candidates, filters=conditions, key=key)
    print_search(answer, as_json=as_json)

"""`make up`: Kafka, Redis and PostgreSQL in the foreground; creates the topics and prints the settings to export.

    python deploy/local/up.py --topic-prefix team-a.

Ctrl-C or SIGTERM stops all three and removes their data.
"""

from __future__ import annotations

import signal
from threading import Event
from typing import Annotated

import typer
from rich.console import Console

from protocols.topics import Topics
from services import ServiceError, Services, create_topics

WORKERS = ("INGEST", "RERANK", "INDEX", "GATEWAY")

errors = Console(stderr=True, highlight=False)


def main(
    topic_prefix: Annotated[str, typer.Option(help="Prefix of every topic name.")] = "",
    partitions: Annotated[
        int, typer.Option(min=1, help="Partitions of each topic, which is also the most workers that can share it.")
    ] = 4,
) -> None:
    """Run Kafka, Redis and PostgreSQL until Ctrl-C."""
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with Services() as services:
            errors.print("Starting Kafka, Redis and PostgreSQL; the first run downloads Kafka (43 MB).")
            exports = {
                "KAFKA_BROKERS": services.brokers,
                "REDIS_URL": services.redis_url,
                "DATABASE_URL": services.database_url,
            }
            create_topics(services.brokers, dict.fromkeys(topic_names(Topics(topic_prefix)), partitions))
            if topic_prefix:
                exports |= {f"{worker}_TOPIC_PREFIX": topic_prefix for worker in WORKERS}
            # Nothing else is on standard output, so that a script can read the settings.
            for name, value in exports.items():
                print(f"export {name}={value}", flush=True)
            errors.print("Export these where the workers run. Ctrl-C ends the servers and removes their data.")
            stop.wait()
            errors.print("Stopping.")
    except ServiceError as error:
        errors.print(str(error), markup=False)
        raise typer.Exit(1) from None


def topic_names(topics: Topics) -> list[str]:
    """Return every topic of the service."""
    inputs = [topics.images_new, topics.rerank_requests, topics.images_indexed]
    replies = [topics.rerank_responses, topics.gateway_replies]
    return [*inputs, *replies, *(topics.dead_letter(topic) for topic in inputs)]


if __name__ == "__main__":
    typer.run(main)

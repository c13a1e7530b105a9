"""Creates the topics of topics.toml where they are missing and gives those that exist its settings.

    python deploy/kafka/create_topics.py --replication-factor 1 --topic-prefix team-a.

Reaches Kafka as the workers do (KAFKA_BROKERS and the other KAFKA_* settings). Never changes the partitions of a topic
that exists: with their number changes where a key goes. Knows no topic by name.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError

from workers.bus.connection import kafka_connection
from workers.errors import Misconfigured
from workers.read_settings import read_settings
from workers.settings import KafkaSettings

TABLE = Path(__file__).with_name("topics.toml")


def wanted_topics(table: dict[str, Any], prefix: str, replication_factor: int) -> dict[str, dict[str, Any]]:
    """Each topic's options, as Kafka's admin client takes them."""
    topics = {}
    for name, own in table["topics"].items():
        configs = table["every_topic"] | {key: value for key, value in own.items() if key != "partitions"}
        # With one copy less than that no message could be written while a broker is away, with one copy none at all.
        configs["min.insync.replicas"] = max(1, min(configs["min.insync.replicas"], replication_factor - 1))
        topics[f"{prefix}{name}"] = {
            "num_partitions": own["partitions"],
            "replication_factor": replication_factor,
            "configs": {key: str(value) for key, value in configs.items()},
        }
    return topics


def create(admin: KafkaAdminClient, topics: dict[str, dict[str, Any]]) -> list[str]:
    """Create and configure; returns a sentence for each topic."""
    present = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(sorted(admin.list_topics()))}
    missing = {name: options for name, options in topics.items() if name not in present}
    if missing:
        admin.create_topics(missing, wait_for_metadata=True)
    there = {name: options for name, options in topics.items() if name in present}
    if there:
        admin.alter_configs(
            [ConfigResource(ConfigResourceType.TOPIC, name, options["configs"]) for name, options in there.items()]
        )
    return [_told(name, options["num_partitions"], present.get(name)) for name, options in topics.items()]


def _told(name: str, wanted: int, present: int | None) -> str:
    if present is None:
        return f"{name}: created with {wanted} partitions"
    if present == wanted:
        return f"{name}: was there; its settings are those of {TABLE.name}"
    return f"{name}: has {present} partitions and keeps them, because keys would move; {TABLE.name} says {wanted}"


def main(
    replication_factor: Annotated[int | None, typer.Option(min=1, help="Copies of each; else topics.toml's.")] = None,
    topic_prefix: Annotated[str, typer.Option(help="Put in front of every topic's name.")] = "",
) -> None:
    """Create the topics that are missing; ends with 1 and a sentence if Kafka does not let it."""
    table = tomllib.loads(TABLE.read_text())
    topics = wanted_topics(table, topic_prefix, replication_factor or table["replication_factor"])
    try:
        admin = KafkaAdminClient(**kafka_connection(read_settings(KafkaSettings), "edje-topics"))
        try:
            for sentence in create(admin, topics):
                print(sentence)
        finally:
            admin.close()
    except (Misconfigured, KafkaError) as error:
        print(f"the topics cannot be created: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)

"""Creates the missing topics of topics.toml and applies its settings to the existing ones.

Run: python deploy/kafka/create_topics.py [--replication-factor 1] [--topic-prefix team-a.]

Connects to Kafka with the KAFKA_* settings of the workers. Never changes the number of partitions of an existing topic,
because keys would move to other partitions.
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
    """Return the options of each topic in the form of Kafka's admin client."""
    topics = {}
    for name, options in table["topics"].items():
        configs = table["every_topic"] | {key: value for key, value in options.items() if key != "partitions"}
        # min.insync.replicas must be below the replication factor, so that writes continue while one broker is down.
        configs["min.insync.replicas"] = max(1, min(configs["min.insync.replicas"], replication_factor - 1))
        topics[f"{prefix}{name}"] = {
            "num_partitions": options["partitions"],
            "replication_factor": replication_factor,
            "configs": {key: str(value) for key, value in configs.items()},
        }
    return topics


def create(admin: KafkaAdminClient, topics: dict[str, dict[str, Any]]) -> list[str]:
    """Create and configure the topics; return one sentence for each."""
    present = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(sorted(admin.list_topics()))}
    missing = {name: options for name, options in topics.items() if name not in present}
    if missing:
        admin.create_topics(missing, wait_for_metadata=True)
    existing = {name: options for name, options in topics.items() if name in present}
    if existing:
        admin.alter_configs(
            [ConfigResource(ConfigResourceType.TOPIC, name, options["configs"]) for name, options in existing.items()]
        )
    return [_sentence(name, options["num_partitions"], present.get(name)) for name, options in topics.items()]


def _sentence(name: str, wanted: int, present: int | None) -> str:
    if present is None:
        return f"{name}: created with {wanted} partitions"
    if present == wanted:
        return f"{name}: exists; the settings of {TABLE.name} are applied"
    return f"{name}: exists with {present} partitions, {TABLE.name} says {wanted}; kept, because keys would move"


def main(
    replication_factor: Annotated[int | None, typer.Option(min=1, help="Replicas per topic.")] = None,
    topic_prefix: Annotated[str, typer.Option(help="Prefix of all topic names.")] = "",
) -> None:
    """Create the missing topics. Exits with 1 and a sentence if Kafka refuses."""
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

"""The topics of a deployment: named as in the contract, sized for the workers' messages, created on a real Kafka."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from deploy_manifests import OVERLAYS, ROOT, WORKERS, environment_of, rendered
from protocols.topics import Topics
from service_worker import eventually
from up import topic_names
from workers.settings import IngestSettings, RerankSettings

FOLDER = ROOT / "deploy" / "kafka"
TABLE = tomllib.loads((FOLDER / "topics.toml").read_text())


def create_topics(brokers: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KAFKA_")}
    return subprocess.run(
        [sys.executable, str(FOLDER / "create_topics.py"), *arguments],
        cwd=ROOT,
        env={**inherited, "KAFKA_BROKERS": brokers},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def admin(kafka_brokers: str, unique_prefix: str) -> Iterator[KafkaAdminClient]:
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=kafka_brokers.split(","))) as admin:
        yield admin
        admin.delete_topics([name for name in admin.list_topics() if name.startswith(unique_prefix)])


def test_the_table_has_the_topics_of_the_contract_and_no_other():
    assert sorted(TABLE["topics"]) == sorted(topic_names(Topics()))


def test_a_topic_accepts_every_message_that_a_worker_may_publish():
    framing_bytes = 12
    limits = [settings.model_fields["max_message_bytes"].default for settings in (IngestSettings, RerankSettings)]

    assert TABLE["every_topic"]["max.message.bytes"] >= max(limits) + framing_bytes
    for overlay in OVERLAYS:
        for worker in WORKERS:
            assert f"{worker.upper()}_MAX_MESSAGE_BYTES" not in environment_of(rendered(overlay), worker)


@pytest.mark.services
def test_missing_topics_are_made_with_the_settings_of_the_table(kafka_brokers: str, admin, unique_prefix: str):
    # An existing topic with fewer partitions is never changed, because its keys would move.
    early = f"{unique_prefix}images.new"
    admin.create_topics({early: {"num_partitions": 2}}, wait_for_metadata=True)

    first = create_topics(kafka_brokers, "--replication-factor=1", f"--topic-prefix={unique_prefix}")
    second = create_topics(kafka_brokers, "--replication-factor=1", f"--topic-prefix={unique_prefix}")

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"{unique_prefix}rerank.requests: created with 48 partitions" in first.stdout
    assert f"{early}: exists with 2 partitions" in second.stdout
    made = {
        topic["name"]: len(topic["partitions"])
        for topic in admin.describe_topics(list(settings_of(admin, unique_prefix)))
    }
    wanted = {f"{unique_prefix}{name}": own["partitions"] for name, own in TABLE["topics"].items()}
    assert made == wanted | {early: 2}
    every = {key: str(value) for key, value in TABLE["every_topic"].items()} | {"min.insync.replicas": "1"}  # one copy
    own = {
        name: {key: str(value) for key, value in each.items() if key != "partitions"}
        for name, each in TABLE["topics"].items()
    }
    configs = {f"{unique_prefix}{name}": every | each for name, each in own.items()}

    def lacking() -> dict[str, dict[str, str]]:
        """Return the settings in the table that the broker does not have, by topic."""
        settings = settings_of(admin, unique_prefix)
        return {
            name: {key: value for key, value in each.items() if settings[name][key] != value}
            for name, each in configs.items()
        }

    # The controller answers before the broker has every setting.
    eventually(lambda: not any(lacking().values()), "every topic has the settings of the table")


def settings_of(admin: KafkaAdminClient, prefix: str) -> dict[str, dict[str, str]]:
    names = [name for name in admin.list_topics() if name.startswith(prefix)]
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    described = admin.describe_configs(resources, config_filter="all")["topic"]
    return {name: {key: entry["value"] for key, entry in entries.items()} for name, entries in described.items()}


def test_a_kafka_that_does_not_answer_is_reported_in_one_sentence():
    refused = create_topics("127.0.0.1:1")

    assert refused.returncode == 1
    assert refused.stderr.startswith("the topics cannot be created: ")
    assert "Traceback" not in refused.stderr

"""The embedded services: they restart after a kill, end with their parent, and report errors."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jgo
import psutil
import psycopg
import pytest
import redis
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from server_process import package_folder
from services import RedisServer, ServiceError, Services, create_topics, kafka_class_path

ORPHAN = """
import sys
from pathlib import Path
from services import RedisServer
server = RedisServer(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.services
def test_a_killed_redis_comes_back_on_its_port_with_its_data(private_redis):
    server = private_redis()
    url = server.url
    with redis.Redis.from_url(url) as client:
        client.set("key", b"value")

        server.kill()
        server.start()

        assert server.url == url
        assert client.get("key") == b"value"


@pytest.mark.services
def test_a_frozen_redis_answers_only_after_it_is_thawed(private_redis):
    server = private_redis()
    server.freeze()
    with redis.Redis.from_url(server.url, socket_timeout=0.2, retry=None) as client:
        with pytest.raises(redis.TimeoutError):
            client.ping()

        server.thaw()

        assert client.ping()


@pytest.mark.services
def test_a_killed_postgres_comes_back_on_its_port_with_its_rows_and_has_pgvector(private_postgres):
    server = private_postgres()
    url = server.url
    with psycopg.connect(url) as connection:
        connection.execute("CREATE EXTENSION vector")
        connection.execute("CREATE TABLE images (embedding halfvec(2))")
        connection.execute("INSERT INTO images VALUES ('[1,0]')")

    server.kill()
    server.start()

    assert server.url == url
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT embedding <=> '[0,1]' FROM images").fetchall() == [(1.0,)]


@pytest.mark.services
def test_a_frozen_postgres_answers_only_after_it_is_thawed(private_postgres):
    server = private_postgres()
    with psycopg.connect(server.url) as connection:
        server.freeze()
        late = ThreadPoolExecutor(1)
        answer = late.submit(lambda: connection.execute("SELECT 1").fetchone())
        with pytest.raises(TimeoutError):
            answer.result(0.2)

        server.thaw()

        assert answer.result(10) == (1,)
        late.shutdown()


@pytest.mark.services
def test_a_killed_kafka_comes_back_on_its_port_with_its_messages(private_kafka):
    server = private_kafka()
    create_topics(server.brokers, {"topic": 1})
    with KafkaProducer(bootstrap_servers=server.brokers) as producer:
        producer.send("topic", b"before").get(timeout=20)

    server.kill()
    server.start()

    consumer = KafkaConsumer(bootstrap_servers=server.brokers, auto_offset_reset="earliest", consumer_timeout_ms=20_000)
    consumer.assign([TopicPartition("topic", 0)])
    assert next(consumer).value == b"before"
    consumer.close()


@pytest.mark.services
def test_topics_that_exist_are_left_as_they_are(kafka_brokers, unique_prefix):
    create_topics(kafka_brokers, {f"{unique_prefix}a": 2})

    create_topics(kafka_brokers, {f"{unique_prefix}a": 3, f"{unique_prefix}b": 1})

    consumer = KafkaConsumer(bootstrap_servers=kafka_brokers)
    assert len(consumer.partitions_for_topic(f"{unique_prefix}a")) == 2
    assert len(consumer.partitions_for_topic(f"{unique_prefix}b")) == 1
    consumer.close()


@pytest.mark.services
def test_all_tests_share_one_redis(redis_url, unique_prefix):
    with redis.Redis.from_url(redis_url) as client:
        assert client.get(unique_prefix) is None


@pytest.mark.services
def test_a_server_dies_with_a_parent_that_is_killed(tmp_path):
    here = Path(__file__).parents[2] / "deploy" / "local"
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path)],
        env={"PYTHONPATH": str(here)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        server = psutil.Process(int(parent.stdout.readline()))

        parent.kill()

        server.wait(timeout=10)
        assert not server.is_running()


@pytest.mark.services
def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path):
    server = RedisServer(tmp_path, {"maxmemory-policy": "sometimes"})

    with pytest.raises(ServiceError, match=r"redis ended with 1(?s:.)*maxmemory-policy"):
        server.start()


def test_addresses_from_the_environment_are_used_and_nothing_is_started(monkeypatch):
    monkeypatch.setenv("KAFKA_BROKERS", "kafka.example:9092")
    monkeypatch.setenv("REDIS_URL", "rediss://redis.example:6380/0")
    monkeypatch.setenv("DATABASE_URL", "postgresql://postgres.example/edje")
    running = psutil.Process().children()

    with Services() as services:
        assert services.brokers == "kafka.example:9092"
        assert services.redis_url == "rediss://redis.example:6380/0"
        assert services.database_url == "postgresql://postgres.example/edje"
    assert psutil.Process().children() == running


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ServiceError, match="a Java runtime is in the package no_such_jdk, which is not installed"):
        package_folder("no_such_jdk", "a Java runtime")


def test_a_failed_download_is_one_sentence(monkeypatch):
    def refuse(endpoint):
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(jgo, "build", refuse)

    with pytest.raises(ServiceError, match=r"the jars of Apache Kafka .* cannot be downloaded: network is unreachable"):
        kafka_class_path()

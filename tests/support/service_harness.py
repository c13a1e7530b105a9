"""Runs the workers as users run them: processes with their settings in the environment, a real Kafka, a real Redis.

Shared by the end-to-end tests and `benchmarks/soak.py`. Knows the wire contract and the settings; looks into no worker
but through its log, its exit status and its pages.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kafka import KafkaAdminClient, KafkaProducer

from edje.init import write_untrained
from edje.model.variants import VARIANTS
from protocols.blob import BlobLayout, blob_key, encode_blob
from protocols.dead_letters import DeadLetter
from protocols.topics import Topics
from service_worker import LIMIT_S, Worker, eventually, let_pass
from workers.bus.reader import KafkaReader
from workers.errors import Transient
from workers.ports import Headers, Record
from workers.store.client import RedisStore

#: One black point, in base64.
SMALL_GIF = "R0lGODdhAQABAIAAAAAAAAAAACwAAAAAAQABAAACAkQBADs="


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An untrained model of the smallest shape, and how its tokens are stored."""

    folder: Path
    layout: BlobLayout

    @classmethod
    def make(cls, folder: Path) -> Checkpoint:
        tiny = VARIANTS["tiny"]
        digest = write_untrained(tiny, folder, seed=0)
        return cls(folder, BlobLayout(digest, tiny.adapter.num_tokens, tiny.joint.dim, "int8"))


class Tap:
    """Reads all records of some topics, in the order of reading."""

    def __init__(self, brokers: str, topics: Sequence[str], *, read_committed: bool) -> None:
        self.records: list[Record] = []
        connection = {"bootstrap_servers": brokers.split(","), "reconnect_backoff_max_ms": 1_000}
        self._reader = KafkaReader(connection, topics, start="beginning", read_committed=read_committed)

    def pull(self) -> list[Record]:
        """Read what has arrived; returns all that was ever read."""
        try:
            self.records.extend(self._reader.poll(0.1))
        except Transient:  # the broker is away; so is what it holds
            let_pass(0.1)
        return self.records

    def wait_for(self, number: int, limit_s: float = LIMIT_S) -> list[Record]:
        """Wait for and return at least this many records."""
        eventually(lambda: len(self.pull()) >= number, f"{number} messages; there are {len(self.records)}", limit_s)
        return self.records

    def wait_ids(self, wanted: Iterable[str], limit_s: float = LIMIT_S) -> dict[str, list[Record]]:
        """Return all records by key, as soon as every wanted key has one."""
        missing = set(wanted)

        def has_all() -> bool:
            missing.difference_update((record.key or b"").decode() for record in self.pull())
            return not missing

        eventually(has_all, "every message has its answer", limit_s)
        return self.by_id()

    def by_id(self) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = {}
        for record in self.records:
            found.setdefault((record.key or b"").decode(), []).append(record)
        return found

    def close(self) -> None:
        """Close the client and keep the records."""
        self._reader.close()
        del self._reader


class Service:
    """Topics, group, folder and workers of one deployment, with the operations of its users."""

    def __init__(self, brokers: str, redis_url: str, prefix: str, checkpoint: Checkpoint, folder: Path) -> None:
        self.brokers = brokers
        self.redis_url = redis_url
        self.checkpoint = checkpoint
        self.topics = Topics(prefix)
        self.workers: list[Worker] = []
        self.program: Sequence[str] = ()  # Python's arguments, if not the worker
        self.variables: dict[str, str] = {}  # of every worker that is started from now on
        self._prefix = prefix
        self._folder = folder
        self._taps: list[Tap] = []
        self._producer: KafkaProducer | None = None
        self._sent: list[Any] = []
        folder.mkdir(parents=True, exist_ok=True)

    def create_topics(self, num_partitions: int = 2, **configs: object) -> None:
        """`configs` are the broker's own settings of a topic, with _ for a dot: max_message_bytes."""
        topics = self.topics
        inputs = (topics.images_new, topics.rerank_requests)
        dead_letters = map(topics.dead_letter, (*inputs, topics.images_indexed))
        names = (*inputs, topics.images_indexed, topics.rerank_responses, topics.gateway_replies, *dead_letters)
        config = {name.replace("_", "."): str(value) for name, value in configs.items()}
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.brokers.split(","))) as admin:
            each = {"num_partitions": num_partitions, "configs": config}
            admin.create_topics(dict.fromkeys(names, each), wait_for_metadata=True)

    def start(self, kind: str, **settings: object) -> Worker:
        """Start a worker process, by default with the constant engine; does not wait for it."""
        chosen = {
            "topic_prefix": self._prefix,
            "group_id": f"{self._prefix}{kind}",
            "checkpoint": self.checkpoint.folder,
            "engine": "constant",
            "session_timeout_ms": 6_000,  # the least that a broker takes unless told otherwise
        } | ({"slab_bytes": "8MiB"} if kind == "rerank" else {})
        return self.start_plain(kind, **(chosen | settings))

    def start_plain(self, kind: str, **settings: object) -> Worker:
        """Start a worker process with these settings and no defaults but the topic prefix; does not wait for it."""
        chosen = {"topic_prefix": self._prefix} | settings
        variables = {f"{kind.upper()}_{name.upper()}": str(value) for name, value in chosen.items()}
        variables |= {"KAFKA_BROKERS": self.brokers, "REDIS_URL": self.redis_url, **self.variables}
        worker = Worker(kind, variables, self._folder / f"{kind}-{len(self.workers)}.log", self.program)
        self.workers.append(worker)
        return worker

    def rerank(self, **settings: object) -> Worker:
        return self.start("rerank", **settings).wait_ready()

    def ingest(self, **settings: object) -> Worker:
        return self.start("ingest", **settings).wait_ready()

    def publish(self, topic: str, value: bytes | None, key: str | None = None, headers: Headers = ()) -> None:
        """Send a record; `flush` waits until the broker has it."""
        self._producer = self._producer or KafkaProducer(
            bootstrap_servers=self.brokers.split(","),
            reconnect_backoff_max_ms=1_000,
            linger_ms=2,
            max_request_size=32 << 20,
            metrics_enabled=False,
        )
        sent = self._producer.send(topic, value, key.encode() if key is not None else None, headers=list(headers))
        self._sent.append(sent)

    def flush(self) -> None:
        """Wait until the broker has everything that was published."""
        sent, self._sent = self._sent, []
        for future in sent:
            future.get(timeout=LIMIT_S)

    def ask(self, request_id: str, images: Sequence[str], text: str = "a dog on a beach", **fields: object) -> None:
        """Publish a request for images, as any client would write it."""
        candidates = [{"image_id": image} for image in images]
        request = {"schema_version": 1, "request_id": request_id, "query": {"text": text}, "candidates": candidates}
        self.publish(self.topics.rerank_requests, json.dumps(request | fields).encode(), request_id)

    def announce(self, image_id: str, **fields: object) -> None:
        """Publish an image event."""
        event = {"schema_version": 1, "image_id": image_id} | fields
        self.publish(self.topics.images_new, json.dumps(event).encode(), image_id)

    def tap(self, *topics: str, read_committed: bool = True) -> Tap:
        tap = Tap(self.brokers, topics, read_committed=read_committed)
        self._taps.append(tap)
        return tap

    def replies(self) -> Tap:
        return self.tap(self.topics.rerank_responses)

    def dead_letters(self, topic: str) -> Tap:
        return self.tap(self.topics.dead_letter(topic))

    def store_images(self, images: Sequence[str]) -> None:
        """Write a blob for each image, past the ingest worker."""
        layout, random = self.checkpoint.layout, np.random.default_rng(0)
        blobs = {
            blob_key(layout.model_digest, image): encode_blob(
                layout, random.normal(size=(layout.num_tokens, layout.token_dim)).astype(np.float32), bytes(32)
            )
            for image in images
        }
        self.write_blobs(blobs)

    def write_blobs(self, blobs: Mapping[str, bytes]) -> None:
        store = RedisStore(self.redis_url)
        store.put_many(blobs)
        store.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for tap in self._taps:
            tap.close()
        if self._producer is not None:
            self._producer.close(timeout=5)
        self._producer = None
        self._sent.clear()


def reply_in(record: Record) -> dict:
    return json.loads(record.value)


def letter_in(record: Record) -> DeadLetter:
    return DeadLetter.from_message(record.key, record.value, record.headers)

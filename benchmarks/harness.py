"""Shared parts of the service's benchmarks: servers, a store full of blobs, requests, and a worker to time.

The worker runs as users run it, as a separate process with its settings in the environment; its engine is the
constant engine, so that everything except scoring is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy" / "local")]

from kafka import KafkaConsumer, KafkaProducer, TopicPartition  # noqa: E402

from edje.init import write_untrained  # noqa: E402
from edje.model.variants import VARIANTS  # noqa: E402
from protocols.blob import (  # noqa: E402
    BlobLayout,
    blob_key,
    encode_blob,
)
from protocols.topics import Topics  # noqa: E402
from services import Services, create_topics, free_port  # noqa: E402
from workers.store.client import RedisStore  # noqa: E402

NUM_TOKENS, TOKEN_DIM, CANDIDATES = 64, 384, 100
NUM_PARTITIONS = 4
QUERY = "a brown dog runs along a beach with a ball in its mouth"
READY_LIMIT_S = 60.0


def make_checkpoint(folder: Path) -> str:
    """Write a checkpoint with the paper's token shape and very few weights; returns its digest."""
    tiny = VARIANTS["tiny"]
    config = replace(
        tiny,
        name="benchmark",
        adapter=replace(tiny.adapter, num_tokens=NUM_TOKENS),
        joint=replace(tiny.joint, dim=TOKEN_DIM, num_heads=12, num_layers=1, max_positions=NUM_TOKENS + 64),
    )
    return write_untrained(config, folder, seed=0)


@dataclass(frozen=True, slots=True)
class Bench:
    """The servers and values that a case needs."""

    services: Services
    checkpoint: Path
    layout: BlobLayout
    images: list[str]

    def keys(self) -> list[str]:
        return [blob_key(self.layout.model_digest, image) for image in self.images]


@contextmanager
def bench(num_images: int) -> Iterator[Bench]:
    """Start servers with `num_images` int8 blobs in Redis."""
    with Services() as services, tempfile.TemporaryDirectory(prefix="edje-bench-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        layout = BlobLayout(make_checkpoint(checkpoint), NUM_TOKENS, TOKEN_DIM, "int8")
        made = Bench(services, checkpoint, layout, [f"img-{number:06d}" for number in range(num_images)])
        fill(made)
        yield made


def fill(bench: Bench) -> None:
    """Write the blobs with sixteen different contents, because random numbers for every image would take long."""
    random = np.random.default_rng(0)
    blobs = [
        encode_blob(bench.layout, random.normal(size=(NUM_TOKENS, TOKEN_DIM)).astype(np.float32), bytes(32))
        for _ in range(16)
    ]
    store, keys = RedisStore(bench.services.redis_url), bench.keys()
    for start in range(0, len(keys), 500):
        store.put_many({key: blobs[number % 16] for number, key in enumerate(keys[start : start + 500], start)})
    store.close()


def request_json(request_id: str, images: list[str]) -> bytes:
    """Return a request as a client would write it."""
    candidates = [{"image_id": image, "score": 0.31} for image in images]
    request = {"schema_version": 1, "request_id": request_id, "query": {"text": QUERY}, "candidates": candidates}
    return json.dumps(request).encode()


class RerankTopics:
    """Request and reply topics of one case, with a producer and a consumer."""

    def __init__(self, brokers: str) -> None:
        self.prefix = f"bench-{uuid.uuid4().hex[:8]}."
        self.topics = Topics(self.prefix)
        self._brokers = brokers.split(",")
        names = (self.topics.rerank_requests, self.topics.rerank_responses)
        create_topics(brokers, dict.fromkeys(names, NUM_PARTITIONS))
        self.producer = KafkaProducer(bootstrap_servers=self._brokers, linger_ms=5, batch_size=1 << 18)
        self.consumer = KafkaConsumer(
            bootstrap_servers=self._brokers, enable_auto_commit=False, fetch_max_wait_ms=100, max_poll_records=5000
        )
        partitions = [TopicPartition(self.topics.rerank_responses, number) for number in range(NUM_PARTITIONS)]
        self.consumer.assign(partitions)
        self.consumer.seek_to_beginning(*partitions)
        for partition in partitions:
            self.consumer.position(partition)

    def publish(self, requests: list[tuple[str, list[str]]]) -> None:
        for request_id, images in requests:
            self.producer.send(self.topics.rerank_requests, request_json(request_id, images), request_id.encode())
        self.producer.flush()

    def num_replies(self) -> int:
        """Return the number of replies in the topic without reading them, which would slow the worker down."""
        partitions = [TopicPartition(self.topics.rerank_responses, number) for number in range(NUM_PARTITIONS)]
        return sum(self.consumer.end_offsets(partitions).values())

    def replies(self, number: int) -> list[tuple[float, dict]]:
        """Read replies; returns the time (seconds) and the event of each."""
        read: list[tuple[float, dict]] = []
        while len(read) < number:
            for records in self.consumer.poll(timeout_ms=500).values():
                read.extend((record.timestamp / 1000, json.loads(record.value)) for record in records)
        return sorted(read, key=lambda reply: reply[0])

    def close(self) -> None:
        self.producer.close()
        self.consumer.close()


@contextmanager
def rerank_worker(bench: Bench, prefix: str, **settings: object) -> Iterator[subprocess.Popen]:
    """Start a rerank worker with the constant engine and wait until it is ready."""
    port = free_port()
    environment = os.environ | {
        "KAFKA_BROKERS": bench.services.brokers,
        "REDIS_URL": bench.services.redis_url,
        "RERANK_TOPIC_PREFIX": prefix,
        "RERANK_GROUP_ID": prefix + "rerank",
        "RERANK_CHECKPOINT": str(bench.checkpoint),
        "RERANK_ENGINE": "constant",
        "RERANK_HTTP_PORT": str(port),
        "RERANK_LOG_LEVEL": "warning",
        **{f"RERANK_{name.upper()}": str(value) for name, value in settings.items()},
    }
    worker = subprocess.Popen([sys.executable, "-m", "workers.rerank"], cwd=ROOT, env=environment)
    try:
        wait_ready(worker, port)
        yield worker
    finally:
        worker.terminate()
        worker.wait(timeout=60)


def wait_ready(worker: subprocess.Popen, port: int) -> None:
    give_up = time.monotonic() + READY_LIMIT_S
    while time.monotonic() < give_up:
        if worker.poll() is not None:
            raise SystemExit(f"the worker ended with {worker.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit(f"the worker was not ready after {READY_LIMIT_S:.0f} s")

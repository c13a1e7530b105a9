"""What a worker counts and times, as Prometheus instruments in a registry of its own.

Each instrument is an attribute; the methods are the words in which the rest of a worker speaks about them, so that a
hot path costs one call. Knows nothing of how the numbers are served (`workers.health`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from trt.engine import EngineInfo
from workers.ports import Partition

T = TypeVar("T", Counter, Histogram)

#: What was tried again.
RetryKind = Literal["connect", "publish", "commit", "store_read", "store_write", "image_fetch"]
#: What a message came to; `dead_letter` also where an error reply went out with it.
Outcome = Literal["ok", "partial", "expired", "error", "dead_letter", "skipped"]
#: Stages of an image on its way into the store.
IngestStage = Literal["fetch", "decode", "encode", "store"]

#: Values of one label. Ours are words from the code; should one ever come from outside, the rest are counted as this.
MAX_LABEL_VALUES = 64
OTHER = "other"

#: From a tenth of a millisecond, the wait for a batch on a fast GPU, to the patience of a retried fetch.
SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PAIRS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
TOKENS = (256, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class ByLabel(Generic[T]):
    """The children of an instrument with one label, each bound on first use, their number bounded."""

    def __init__(self, instrument: T) -> None:
        self._instrument: T = instrument
        self._children: dict[str, T] = {}

    def __getitem__(self, value: str) -> T:
        child = self._children.get(value)
        if child is None:
            if len(self._children) >= MAX_LABEL_VALUES:
                value = OTHER
            child = self._children[value] = self._instrument.labels(value)
        return child


class Metrics:
    """All instruments of a worker; ingest and rerank use those that concern them."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        # every worker
        self.events = ByLabel(self._counter("edje_events", "Messages that have their outcome.", "outcome"))
        self.dead_letters = ByLabel(self._counter("edje_dead_letters", "Messages dead-lettered, by cause.", "code"))
        self.retries = ByLabel(self._counter("edje_retries", "Attempts that failed and were made again.", "kind"))
        self.commits = self._counter("edje_commits", "Offset commits and transactions that the broker has recorded.")
        self.inflight_events = self._gauge("edje_inflight_events", "Messages taken and not yet finished.")
        self.lag = Gauge(
            "edje_consumer_lag_events",
            "Messages of an assigned partition beyond the last one taken.",
            ("topic", "partition"),
            registry=self.registry,
        )
        self.loop_turns = self._counter("edje_loop_turns", "Turns of the worker's loop.")
        self.engine = Info("edje_engine", "The engine in use.", registry=self.registry)

        # rerank
        self.replies = ByLabel(self._counter("edje_replies", "Replies made, by status.", "status"))
        self.replies_replaced = self._counter(
            "edje_replies_replaced", "Replies that the broker refused and an error reply took the place of."
        )
        self.pairs = self._counter("edje_pairs", "Pairs in replies that went out with a ranking.")
        self.inflight_pairs = self._gauge("edje_inflight_pairs", "Pairs of requests in work.")
        self.reply_seconds = self._histogram(
            "edje_reply_seconds", "From taking a request to its reply, replies without a ranking left out.", SECONDS
        )
        self.queue_wait_seconds = self._histogram(
            "edje_queue_wait_seconds", "From taking a request to the start of its first piece.", SECONDS
        )
        self.fetch_seconds = self._histogram("edje_fetch_seconds", "One read of blobs from the store.", SECONDS)
        self.batch_seconds = self._histogram("edje_batch_seconds", "One micro-batch on the engine.", SECONDS)
        self.batch_pairs = self._histogram("edje_batch_pairs", "Pairs in a micro-batch.", PAIRS)
        self.batch_tokens = self._histogram("edje_batch_tokens", "Text and visual tokens in a micro-batch.", TOKENS)
        self.slab_hits = self._counter("edje_slab_hits", "Images wanted that had a slot.")
        self.slab_misses = self._counter("edje_slab_misses", "Images wanted that had to be fetched.")
        self.slab_evictions = self._counter("edje_slab_evictions", "Images that lost their slot to another.")
        self.slab_slots_used = self._gauge("edje_slab_slots_used", "Slots of the token slab that hold an image.")
        self.bad_blobs = ByLabel(
            self._counter("edje_bad_blobs", "Images without a usable blob, by what was wrong.", "reason")
        )
        self.blob_bytes = self._counter("edje_store_read_bytes", "Bytes of blobs read from the store.")

        # ingest
        stages = Histogram(
            "edje_image_seconds", "One image in one stage.", ("stage",), buckets=SECONDS, registry=self.registry
        )
        self.image_seconds = ByLabel(stages)
        self.batch_images = self._histogram("edje_batch_images", "Images in a batch on the engine.", IMAGES)
        self.inflight_bytes = self._gauge("edje_inflight_bytes", "Bytes of images in work.")
        self.store_write_bytes = self._counter("edje_store_write_bytes", "Bytes of blobs written to the store.")

        self._lagging: set[Partition] = set()
        self._num_evicted = 0

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, buckets=buckets, registry=self.registry)

    def count_event(self, outcome: Outcome) -> None:
        self.events[outcome].inc()

    def count_dead_letter(self, code: str) -> None:
        self.dead_letters[code].inc()

    def count_retry(self, kind: RetryKind) -> None:
        self.retries[kind].inc()

    def count_commit(self) -> None:
        self.commits.inc()

    def count_reply(self, status: str, *, seconds: float | None, num_pairs: int) -> None:
        """`seconds` is None where the request never got as far as being timed."""
        self.replies[status].inc()
        if num_pairs:
            self.pairs.inc(num_pairs)
        if seconds is not None:
            self.reply_seconds.observe(seconds)

    def observe_queue_wait(self, seconds: float) -> None:
        self.queue_wait_seconds.observe(seconds)

    def observe_batch(self, *, num_pairs: int, num_tokens: int, seconds: float) -> None:
        self.batch_pairs.observe(num_pairs)
        self.batch_tokens.observe(num_tokens)
        self.batch_seconds.observe(seconds)

    def observe_image(self, stage: IngestStage, seconds: float) -> None:
        self.image_seconds[stage].observe(seconds)

    def count_evictions(self, num_evicted: int) -> None:
        """`num_evicted` is the number since the worker's start."""
        self.slab_evictions.inc(num_evicted - self._num_evicted)
        self._num_evicted = num_evicted

    def count_slab_lookups(self, *, hits: int, misses: int) -> None:
        if hits:
            self.slab_hits.inc(hits)
        if misses:
            self.slab_misses.inc(misses)

    def count_bad_blobs(self, reason: str, count: int) -> None:
        self.bad_blobs[reason].inc(count)

    def count_blob_bytes(self, num_bytes: int) -> None:
        self.blob_bytes.inc(num_bytes)

    def set_lag(self, lag: Mapping[Partition, int]) -> None:
        """Replace the lag of all partitions; one that went to another worker is no longer shown."""
        for partition in self._lagging - lag.keys():
            self.lag.remove(partition.topic, str(partition.number))
        for partition, num_events in lag.items():
            self.lag.labels(partition.topic, str(partition.number)).set(num_events)
        self._lagging = set(lag)

    def set_engine(self, info: EngineInfo) -> None:
        self.engine.info(
            {
                "runtime": info.runtime,
                "model_digest": info.model_digest,
                "engine_digest": info.engine_digest,
                "storage": info.storage,
            }
        )

"""The Prometheus instruments of a worker, in one registry.

Each instrument is an attribute; each method updates the instruments of one event in one call. Names and meanings are in
`workers.telemetry.names`. Knows nothing of how the numbers are served (`workers.health`) or exported
(`workers.telemetry.metric_export`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from trt.contract import EngineInfo
from workers.ports import Interval, Partition, SpanIds
from workers.telemetry import names
from workers.telemetry.names import Metric

T = TypeVar("T", Counter, Histogram)

#: Kinds of repeated attempts.
RetryKind = Literal["connect", "publish", "commit", "store_read", "store_write", "image_fetch", "index_write"]
#: Outcomes of a message; `dead_letter` also if an error reply was published too.
Outcome = Literal["ok", "partial", "expired", "error", "dead_letter", "skipped", "superseded", "removed"]
#: Stages of an image until it is stored.
IngestStage = Literal["fetch", "look_up", "decode", "encode", "store"]
#: The trace of a sampled request, which links a histogram bucket to one of its requests.
Exemplar = dict[str, str]

#: Most values of one label; further values are counted as `OTHER`.
MAX_LABEL_VALUES = 64
OTHER = "other"


class ByLabel(Generic[T]):
    """The children of an instrument with one label, created on first use and bounded in number."""

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


class _KnownGauge(Collector):
    """A gauge that is absent while its value is unknown."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self.value: float | None = None

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._metric.name, self._metric.meaning)
        if self.value is not None:
            family.add_metric([], self.value)
        yield family


class Metrics:
    """All instruments; each kind of worker uses some of them."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        # every worker
        self.events = ByLabel(self._counter(names.EVENTS))
        self.dead_letters = ByLabel(self._counter(names.DEAD_LETTERS))
        self.retries = ByLabel(self._counter(names.RETRIES))
        self.commits = self._counter(names.COMMITS)
        self.inflight_events = self._gauge(names.INFLIGHT_EVENTS)
        self.lag = self._gauge(names.LAG)
        self.loop_turns = self._counter(names.LOOP_TURNS)
        self.engine = Info(
            names.ENGINE_INFO.name.removesuffix("_info"), names.ENGINE_INFO.meaning, registry=self.registry
        )
        self.engine_graphs = self._gauge(names.ENGINE_GRAPHS)
        self.stage_seconds = ByLabel(self._histogram(names.STAGE_SECONDS))
        self.spans_dropped = self._counter(names.SPANS_DROPPED)
        self.bad_traceparents = self._counter(names.BAD_TRACEPARENTS)

        # rerank
        self.replies = ByLabel(self._counter(names.REPLIES))
        self.replies_replaced = self._counter(names.REPLIES_REPLACED)
        self.reply_warnings = ByLabel(self._counter(names.REPLY_WARNINGS))
        self.pairs = self._counter(names.PAIRS_TOTAL)
        self.inflight_pairs = self._gauge(names.INFLIGHT_PAIRS)
        self.backlog = _KnownGauge(names.BACKLOG_SECONDS)
        self.registry.register(self.backlog)
        self.reply_seconds = self._histogram(names.REPLY_SECONDS)
        self.queue_wait_seconds = self._histogram(names.QUEUE_WAIT_SECONDS)
        self.fetch_seconds = self._histogram(names.FETCH_SECONDS)
        self.batch_seconds = self._histogram(names.BATCH_SECONDS)
        self.batch_pairs = self._histogram(names.BATCH_PAIRS)
        self.batch_tokens = self._histogram(names.BATCH_TOKENS)
        self.batch_fill = self._histogram(names.BATCH_FILL)
        self.slab_hits = self._counter(names.SLAB_HITS)
        self.slab_misses = self._counter(names.SLAB_MISSES)
        self.slab_evictions = self._counter(names.SLAB_EVICTIONS)
        self.slab_invalidations = self._counter(names.SLAB_INVALIDATIONS)
        self.slab_slots_used = self._gauge(names.SLAB_SLOTS_USED)
        self.bad_blobs = ByLabel(self._counter(names.BAD_BLOBS))
        self.blob_bytes = self._counter(names.STORE_READ_BYTES)

        # ingest
        self.image_seconds = ByLabel(self._histogram(names.IMAGE_SECONDS))
        self.batch_images = self._histogram(names.BATCH_IMAGES)
        self.inflight_bytes = self._gauge(names.INFLIGHT_BYTES)
        self.store_write_bytes = self._counter(names.STORE_WRITE_BYTES)

        # index
        self.index_write_seconds = self._histogram(names.INDEX_WRITE_SECONDS)
        self.index_without_vector = self._counter(names.INDEX_WITHOUT_VECTOR)

        # gateway
        self.http_requests = self._counter(names.HTTP_REQUESTS)
        self.http_seconds = ByLabel(self._histogram(names.HTTP_SECONDS))
        self.http_open = self._gauge(names.HTTP_OPEN)
        self.gateway_pairs = self._gauge(names.GATEWAY_PAIRS)
        self.gateway_degraded = ByLabel(self._counter(names.GATEWAY_DEGRADED))
        self.gateway_refused = ByLabel(self._counter(names.GATEWAY_REFUSED))
        self.gateway_cancelled = self._counter(names.GATEWAY_CANCELLED)
        self.gateway_replies = ByLabel(self._counter(names.GATEWAY_REPLIES))
        self.gateway_seconds = ByLabel(self._histogram(names.GATEWAY_SECONDS))

        self._lagging: set[Partition] = set()
        self._num_evicted = 0

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.meaning, metric.labels, registry=self.registry)

    def _gauge(self, metric: Metric) -> Gauge:
        return Gauge(metric.name, metric.meaning, metric.labels, registry=self.registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.meaning, metric.labels, buckets=metric.buckets, registry=self.registry)

    def count_event(self, outcome: Outcome) -> None:
        self.events[outcome].inc()

    def count_dead_letter(self, code: str) -> None:
        self.dead_letters[code].inc()

    def count_retry(self, kind: RetryKind) -> None:
        self.retries[kind].inc()

    def count_commit(self) -> None:
        self.commits.inc()

    def count_reply(
        self, status: str, *, seconds: float | None, num_pairs: int, exemplar: Exemplar | None = None
    ) -> None:
        """Count a reply; `seconds` is None if the request was refused before its timing began."""
        self.replies[status].inc()
        if num_pairs:
            self.pairs.inc(num_pairs)
        if seconds is not None:
            self.reply_seconds.observe(seconds, exemplar)

    def count_warning(self, code: str) -> None:
        self.reply_warnings[code].inc()

    def observe_queue_wait(self, seconds: float, exemplar: Exemplar | None) -> None:
        self.queue_wait_seconds.observe(seconds, exemplar)

    def observe_stages(self, stages: Mapping[str, Interval], exemplar: Exemplar | None) -> None:
        for stage, interval in stages.items():
            self.stage_seconds[stage].observe(interval.seconds, exemplar)

    def observe_publish(self, seconds: float, span: SpanIds | None) -> None:
        exemplar = None if span is None else {"trace_id": f"{span.trace_id:032x}"}
        self.stage_seconds[names.PUBLISH].observe(seconds, exemplar)

    def observe_batch(self, *, num_pairs: int, num_tokens: int, max_tokens: int, seconds: float) -> None:
        self.batch_pairs.observe(num_pairs)
        self.batch_tokens.observe(num_tokens)
        self.batch_fill.observe(num_tokens / max_tokens)
        self.batch_seconds.observe(seconds)

    def observe_image(self, stage: IngestStage, seconds: float, exemplar: Exemplar | None) -> None:
        self.image_seconds[stage].observe(seconds, exemplar)

    def count_evictions(self, num_evicted: int) -> None:
        """Count evictions; `num_evicted` is the total since the worker's start."""
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
        """Replace the lag of all partitions; partitions that are not in `lag` are removed."""
        for partition in self._lagging - lag.keys():
            self.lag.remove(partition.topic, str(partition.number))
        for partition, num_events in lag.items():
            self.lag.labels(partition.topic, str(partition.number)).set(num_events)
        self._lagging = set(lag)

    def set_graphs(self, *, captured: int, uncaptured: int) -> None:
        """Set the number of sizes with and without a CUDA graph."""
        self.engine_graphs.labels("captured").set(captured)
        self.engine_graphs.labels("uncaptured").set(uncaptured)

    def set_engine(self, info: EngineInfo) -> None:
        self.engine.info(
            {
                "runtime": info.runtime,
                "model_digest": info.model_digest,
                "engine_digest": info.engine_digest,
                "storage": info.storage,
            }
        )

"""Sends the metrics of a worker to an OTLP collector at an interval, for systems that do not scrape.

Reads the Prometheus registry and converts it to OTLP. A failed export loses nothing: metrics are running
totals, which the next export sends again.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import structlog
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    MetricExporter,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Metric as OtlpMetric
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric, Sample

from workers.telemetry.finished_span import SCOPE

log = structlog.get_logger(__name__)

_CUMULATIVE = AggregationTemporality.CUMULATIVE


def metrics_data(families: Iterable[Metric], resource: Resource, *, start_ns: int, now_ns: int) -> MetricsData:
    """Return the families of a registry as OTLP; totals count from `start_ns` on."""
    metrics = []
    for family in families:
        data = _data(family, start_ns, now_ns)
        if data.data_points:
            name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
            unit = "s" if family.name.endswith("_seconds") else "1"
            metrics.append(OtlpMetric(name, family.documentation, unit, data))
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(InstrumentationScope(SCOPE), metrics, "")], "")])


def _data(family: Metric, start_ns: int, now_ns: int) -> Sum | Gauge | Histogram:
    match family.type:
        case "histogram":
            return Histogram(list(_histogram_points(family.samples, start_ns, now_ns)), _CUMULATIVE)
        case "counter":
            totals = [sample for sample in family.samples if sample.name.endswith("_total")]
            return Sum(_number_points(totals, start_ns, now_ns), _CUMULATIVE, is_monotonic=True)
        case _:
            return Gauge(_number_points(family.samples, start_ns, now_ns))


def _number_points(samples: Iterable[Sample], start_ns: int, now_ns: int) -> list[NumberDataPoint]:
    return [NumberDataPoint(dict(sample.labels), start_ns, now_ns, sample.value) for sample in samples]


def _histogram_points(samples: Iterable[Sample], start_ns: int, now_ns: int) -> Iterator[HistogramDataPoint]:
    """Yield one point per histogram; Prometheus has many samples per histogram, with cumulative buckets."""
    series: dict[tuple[tuple[str, str], ...], dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        series[labels][sample.name.rpartition("_")[2]].append(sample)
    for labels, parts in series.items():
        buckets = [(float(sample.labels["le"]), int(sample.value)) for sample in parts["bucket"]]
        totals = [0, *(total for _, total in buckets)]
        yield HistogramDataPoint(
            attributes=dict(labels),
            start_time_unix_nano=start_ns,
            time_unix_nano=now_ns,
            count=totals[-1],
            sum=parts["sum"][0].value,
            bucket_counts=[after - before for before, after in pairwise(totals)],
            explicit_bounds=[bound for bound, _ in buckets[:-1]],
            min=None,  # type: ignore[arg-type]  # optional in OTLP, and not recorded
            max=None,  # type: ignore[arg-type]
        )


class MetricExport:
    """Exports a registry at an interval, and once more at the end."""

    def __init__(
        self,
        registry: CollectorRegistry,
        exporter: MetricExporter,
        resource: Resource,
        *,
        interval_s: float,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._registry = registry
        self._exporter = exporter
        self._resource = resource
        self._interval_s = interval_s
        self._wall_ns = wall_ns
        self._start_ns = wall_ns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metric-export", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        """False once its thread has died; the loop then ends the worker."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._export()
        self._export()

    def _export(self) -> None:
        families = self._registry.collect()
        data = metrics_data(families, self._resource, start_ns=self._start_ns, now_ns=self._wall_ns())
        try:
            self._exporter.export(data)  # logs the collector's answers itself
        except Exception as error:  # for example an address without a scheme, or a missing certificate
            log.warning("metrics not exported; the next export repeats all of them", error=str(error))

    def close(self, timeout_s: float) -> None:
        self._stop.set()
        self._thread.join(timeout_s)
        self._exporter.shutdown()

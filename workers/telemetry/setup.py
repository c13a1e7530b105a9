"""Builds a worker's telemetry from its options: the sampling, and the destinations of spans and metrics.

The SDK reads the variables that only an exporter needs (address, headers, TLS, timeout, compression).
Without a destination nothing is sampled, no thread runs and no exporter is imported.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from prometheus_client import CollectorRegistry

from workers.telemetry.finished_span import FinishedSpan, SpanExporter
from workers.telemetry.metric_export import MetricExport
from workers.telemetry.options import TelemetryOptions
from workers.telemetry.sampling import Sampling
from workers.telemetry.span_file import SpanFile
from workers.telemetry.span_queue import QueueLimits, SpanQueue
from workers.telemetry.tracer import Tracer

#: Timeout for exporting the last spans and metrics of a worker.
CLOSE_S = 2.0


class Counter(Protocol):
    """A counter of the metrics."""

    def inc(self, amount: float = 1) -> None: ...


class SpanCounters(Protocol):
    """The counters that tracing increments."""

    @property
    def spans_dropped(self) -> Counter: ...

    @property
    def bad_traceparents(self) -> Counter: ...


def start_tracing(
    name: str, options: TelemetryOptions, counters: SpanCounters, clock: Callable[[], float], stack: ExitStack
) -> Tracer:
    """Return the worker's tracer; closing the stack exports queued spans. Raises `Misconfigured`."""
    exporters = _span_exporters(options, resource_of(name))
    if not exporters:
        return Tracer.off(counters.bad_traceparents.inc)
    limits = QueueLimits(options.max_queue_spans, options.max_batch_spans, options.span_delay_s)
    puts = []
    for exporter in exporters:
        queue = SpanQueue(exporter, limits, counters.spans_dropped.inc)
        stack.callback(queue.close, CLOSE_S)
        puts.append(queue.put)

    def emit(span: FinishedSpan) -> None:
        for put in puts:
            put(span)

    return Tracer(
        sampling=Sampling.named(options.sampler, options.sampler_ratio),
        emit=puts[0] if len(puts) == 1 else emit,
        clock=clock,
        wall_ns=time.time_ns,
        count_bad_context=counters.bad_traceparents.inc,
    )


def start_metric_export(
    name: str, options: TelemetryOptions, registry: CollectorRegistry, stack: ExitStack
) -> MetricExport | None:
    """Return the running export of metrics, None without a collector."""
    if not options.sends_metrics:
        return None
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    export = MetricExport(registry, OTLPMetricExporter(), resource_of(name), interval_s=options.metric_interval_s)
    stack.callback(export.close, CLOSE_S)
    return export


def _span_exporters(options: TelemetryOptions, resource: Resource) -> list[SpanExporter]:
    exporters: list[SpanExporter] = []
    if options.sends_spans:
        from workers.telemetry.otlp_exporter import OtlpExporter

        exporters.append(OtlpExporter(resource))
    if options.span_file is not None:
        exporters.append(SpanFile(resource, options.span_file, options.span_file_bytes))
    return exporters


def resource_of(name: str) -> Resource:
    """Return the resource of all telemetry; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence."""
    given = Resource.create()
    ours = {SERVICE_INSTANCE_ID: f"{socket.gethostname()}-{os.getpid()}"}
    if str(given.attributes[SERVICE_NAME]).startswith("unknown_service"):
        given = given.merge(Resource({SERVICE_NAME: f"edje-{name}"}))
    return Resource(ours).merge(given)

"""Puts a worker's telemetry together from its settings: what is sampled, and where spans and metrics go.

The standard OTEL_* variables say so; where an exporter has more of them (headers, TLS, timeouts, compression) the SDK
reads those itself. With none set, nothing is sampled, no thread runs and no exporter is imported.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource

from workers.metrics import Metrics
from workers.settings import ServiceSettings
from workers.telemetry.finished_span import FinishedSpan, SpanExporter
from workers.telemetry.metric_export import MetricExport
from workers.telemetry.sampling import Sampling
from workers.telemetry.span_file import SpanFile
from workers.telemetry.span_queue import QueueLimits, SpanQueue
from workers.telemetry.tracer import Tracer

#: For the last spans and metrics, at the end of a worker whose collector may be away.
CLOSE_S = 2.0


def start_tracing(
    name: str, settings: ServiceSettings, metrics: Metrics, clock: Callable[[], float], stack: ExitStack
) -> Tracer:
    """The worker's tracer; its queues are emptied when the stack is left. Raises `Misconfigured`."""
    exporters = [] if settings.otel_sdk_disabled else _span_exporters(settings, resource_of(name))
    if not exporters:
        return Tracer.off(metrics.bad_traceparents.inc)
    limits = QueueLimits(
        settings.otel_max_queue_spans, settings.otel_max_batch_spans, settings.otel_span_delay_ms / 1000
    )
    puts = []
    for exporter in exporters:
        queue = SpanQueue(exporter, limits, metrics.spans_dropped.inc)
        stack.callback(queue.close, CLOSE_S)
        puts.append(queue.put)

    def emit(span: FinishedSpan) -> None:
        for put in puts:
            put(span)

    return Tracer(
        sampling=Sampling.named(settings.otel_traces_sampler, settings.otel_traces_sampler_arg),
        emit=puts[0] if len(puts) == 1 else emit,
        clock=clock,
        wall_ns=time.time_ns,
        count_bad_context=metrics.bad_traceparents.inc,
    )


def start_metric_export(
    name: str, settings: ServiceSettings, metrics: Metrics, stack: ExitStack
) -> MetricExport | None:
    """The export of metrics where there is a collector, None elsewhere."""
    if settings.otel_sdk_disabled or not (settings.otlp_endpoint or settings.otlp_metrics_endpoint):
        return None
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    interval_s = settings.otel_metric_export_interval_ms / 1000
    export = MetricExport(metrics.registry, OTLPMetricExporter(), resource_of(name), interval_s=interval_s)
    stack.callback(export.close, CLOSE_S)
    return export


def _span_exporters(settings: ServiceSettings, resource: Resource) -> list[SpanExporter]:
    exporters: list[SpanExporter] = []
    if settings.otlp_endpoint or settings.otlp_traces_endpoint:
        from workers.telemetry.otlp_exporter import OtlpExporter

        exporters.append(OtlpExporter(resource))
    if settings.span_file is not None:
        exporters.append(SpanFile(resource, settings.span_file, settings.span_file_bytes))
    return exporters


def resource_of(name: str) -> Resource:
    """Who tells it; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before ours."""
    given = Resource.create()
    ours = {SERVICE_INSTANCE_ID: f"{socket.gethostname()}-{os.getpid()}"}
    if str(given.attributes[SERVICE_NAME]).startswith("unknown_service"):
        given = given.merge(Resource({SERVICE_NAME: f"edje-{name}"}))
    return Resource(ours).merge(given)

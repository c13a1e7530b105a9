"""One connected trace through a real worker, Kafka, Redis and OpenTelemetry Collector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from collector_harness import Collector, collector_binary
from server_process import ServiceError
from service_harness import SMALL_GIF, Service, reply_in
from service_worker import eventually
from skipping import missing
from workers.telemetry import names
from workers.telemetry.trace_context import read_context, trace_id_of
from workers.traces.reading import Span, read_spans
from workers.traces.waterfall import waterfall_of

pytest_plugins = ["service_fixtures"]
pytestmark = [pytest.mark.services, pytest.mark.timeout(1200)]  # the first time, the Collector is built


@pytest.fixture(scope="session")
def binary() -> Path:
    try:
        return collector_binary()
    except ServiceError as error:
        missing(str(error))


@pytest.fixture
def collector(binary: Path, tmp_path: Path) -> Iterator[Collector]:
    server = Collector(tmp_path / "collector")
    server.start()
    yield server
    server.stop()


def producer_headers(collector: Collector, name: str) -> tuple[tuple[str, bytes], ...]:
    """Return the trace headers of a producer with the usual SDK, after its span was exported to the Collector."""
    provider = TracerProvider(resource=Resource({"service.name": "search"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{collector.url}/v1/traces")))
    carrier: dict[str, str] = {}
    span = provider.get_tracer("search").start_span(name, kind=SpanKind.PRODUCER)
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    span.end()
    provider.shutdown()
    return tuple((name, value.encode()) for name, value in carrier.items())


def ancestors(span: Span, spans: dict[str, Span]) -> list[str]:
    """Return the names of the span's ancestors, the parent first."""
    found = []
    while (parent := spans.get(span.parent_id or "")) is not None:
        found.append(parent.name)
        span = parent
    return found


def test_the_collector_holds_one_connected_trace_from_the_producers_span_to_the_reply(
    service: Service, collector: Collector
):
    service.variables |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
    }
    service.store_images(["dog", "cat"])
    worker = service.rerank()
    headers = producer_headers(collector, "send request")
    request = {
        "schema_version": 1,
        "request_id": "r-1",
        "query": {"text": "a dog"},
        "candidates": [{"image_id": "dog"}, {"image_id": "cat"}],
    }
    service.publish(service.topics.rerank_requests, json.dumps(request).encode(), "r-1", headers)
    service.flush()
    (reply,) = service.replies().wait_ids(["r-1"])["r-1"]
    eventually(lambda: worker.metric("edje_commits_total") > 0, "the offset is committed")
    assert worker.stop() == 0

    trace_id, file = trace_id_of(headers), collector.file("traces")
    topics = service.topics
    commit = f"commit {topics.rerank_requests}"
    eventually(lambda: f'"{commit}"' in file.read_text(), "the Collector has written the last span")
    found = read_spans([file])
    assert found.num_bad_lines == 0
    spans = {span.span_id: span for span in found.spans if span.trace_id == trace_id}
    (sent,) = (span for span in spans.values() if span.name == f"send {topics.rerank_responses}")
    assert ancestors(sent, spans) == [f"process {topics.rerank_requests}", "send request"]
    carried = read_context(reply.headers)
    assert (carried.trace_id.decode(), carried.span_id.decode()) == (trace_id, sent.span_id)
    assert carried.is_sampled

    waterfall = waterfall_of(found.spans, "r-1")
    assert waterfall is not None
    shown = {row.span.name: row for row in waterfall.rows}
    assert {
        "send request",
        f"poll {topics.rerank_requests}",
        f"process {topics.rerank_requests}",
        "fetch",
        "MGET",
        "score",
        "micro-batch",
        "encode queries",
        "score pairs",
        f"send {topics.rerank_responses}",
        commit,
    } <= shown.keys()
    assert shown["micro-batch"].is_shared
    timings = reply_in(reply)["timings_ms"]
    assert shown[f"process {topics.rerank_requests}"].duration_ms == pytest.approx(timings["total"], abs=0.001)
    assert shown["fetch"].duration_ms == pytest.approx(timings["fetch"], abs=0.001)
    assert shown["micro-batch"].span.attributes[names.ENGINE.name] == reply_in(reply)["engine"]

    metrics = collector.file("metrics").read_text()
    for name in ("edje_replies_total", "edje_stage_seconds", "edje_engine_info"):
        assert f'"{name}"' in metrics


def test_an_image_is_traced_from_its_producer_to_the_store_and_images_indexed(
    service: Service, collector: Collector, unique_prefix: str
):
    image_id = f"{unique_prefix}point"  # no other test has stored it
    service.variables |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    worker = service.ingest()
    event = {"schema_version": 1, "image_id": image_id, "data": SMALL_GIF}
    headers = producer_headers(collector, "send image")
    service.publish(service.topics.images_new, json.dumps(event).encode(), image_id, headers)
    service.flush()
    service.tap(service.topics.images_indexed).wait_ids([image_id])
    eventually(lambda: worker.metric("edje_commits_total") > 0, "the offset is committed")
    assert worker.stop() == 0

    commit = f"commit {service.topics.images_new}"
    eventually(lambda: f'"{commit}"' in collector.file("traces").read_text(), "the last span is written")
    waterfall = waterfall_of(read_spans([collector.file("traces")]).spans, image_id)
    assert waterfall is not None
    assert {"send image", "decode", "encode", "store", "encode batch", "PIPELINE SET", "MGET", commit} <= {
        row.span.name for row in waterfall.rows
    }


def test_a_collector_that_is_away_delays_no_reply_and_lost_spans_are_counted(service: Service):
    service.variables |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    service.store_images(["dog"])
    worker = service.rerank()
    for number in range(20):
        service.ask(f"r-{number}", ["dog"])
    service.flush()
    service.replies().wait_ids([f"r-{number}" for number in range(20)])

    eventually(lambda: worker.metric("edje_spans_dropped_total") > 0, "lost spans are counted")
    assert worker.stop() == 0

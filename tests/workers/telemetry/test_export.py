"""Where spans and metrics go, and that a destination that is slow or away costs no request anything."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_OFF,
    DEFAULT_ON,
    Decision,
    ParentBasedTraceIdRatio,
    TraceIdRatioBased,
)
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from structlog.testing import capture_logs

from tracing_harness import Recorded, as_sdk_span
from workers.errors import Misconfigured
from workers.metrics import Metrics
from workers.ports import Interval
from workers.settings import RerankSettings
from workers.telemetry import names
from workers.telemetry.finished_span import FinishedSpan
from workers.telemetry.metric_export import MetricExport, metrics_data
from workers.telemetry.otlp_exporter import OtlpExporter
from workers.telemetry.otlp_json import span_line
from workers.telemetry.otlp_protobuf import encode_request
from workers.telemetry.sampling import Sampling
from workers.telemetry.setup import resource_of, start_metric_export, start_tracing
from workers.telemetry.span_file import SpanFile, predecessor_of
from workers.telemetry.span_queue import QueueLimits, SpanQueue
from workers.telemetry.tracer import child_of, root

GIVE_UP_S = 30.0
NOBODY = Resource.get_empty()


def spans(number: int) -> list[FinishedSpan]:
    recorded = Recorded()
    tracer = recorded.tracer()
    for offset in range(number):
        attributes = {"offset": offset, "ids": ("a", "b"), "share": 0.5, "is_new": True}
        tracer.record(
            names.SEND, child_of(root()), Interval(1.0, 2.0), attributes, of="out", links=[root()], failed=True
        )
    return recorded.finished


class HeldExporter:
    """Takes its time until the test lets it go."""

    def __init__(self, *, is_taken: bool = True) -> None:
        self.go, self.asked = threading.Event(), threading.Event()
        self.exported: list[FinishedSpan] = []
        self.sizes: list[int] = []
        self.is_taken = is_taken

    def export(self, spans: Sequence[FinishedSpan]) -> bool:
        self.asked.set()
        assert self.go.wait(GIVE_UP_S)
        self.exported.extend(spans)
        self.sizes.append(len(spans))
        return self.is_taken

    def shutdown(self) -> None:
        self.go.set()


class BrokenExporter(HeldExporter):
    def export(self, spans: Sequence[FinishedSpan]) -> bool:
        raise OSError("the disk is full")


class Dropped:
    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int) -> None:
        self.number += number


def queue_to(exporter: HeldExporter, dropped: Dropped, *, delay_s: float = GIVE_UP_S) -> SpanQueue:
    return SpanQueue(exporter, QueueLimits(max_spans=8, max_batch=4, delay_s=delay_s), dropped)


def test_a_slow_destination_does_not_block_and_spans_that_find_the_queue_full_are_counted():
    exporter, dropped = HeldExporter(), Dropped()
    queue = queue_to(exporter, dropped)

    for span in spans(20):
        queue.put(span)
    assert exporter.asked.wait(GIVE_UP_S)
    exporter.go.set()
    queue.close(GIVE_UP_S)

    assert (len(exporter.exported), dropped.number) == (8, 12)


def test_spans_that_a_destination_refuses_are_counted():
    exporter, dropped = HeldExporter(is_taken=False), Dropped()
    exporter.go.set()
    queue = queue_to(exporter, dropped)

    for span in spans(5):
        queue.put(span)
    queue.close(GIVE_UP_S)

    assert dropped.number == 5


def test_a_destination_that_raises_loses_its_spans_and_not_its_thread():
    exporter, dropped = BrokenExporter(), Dropped()
    queue = queue_to(exporter, dropped)

    with capture_logs() as logs:
        for span in spans(6):
            queue.put(span)
        queue.close(GIVE_UP_S)

    assert dropped.number == 6
    assert [line["num_spans"] for line in logs] == [4, 2]


def test_a_full_batch_is_sent_at_once_and_the_rest_when_its_time_has_come():
    exporter, dropped = HeldExporter(), Dropped()
    exporter.go.set()
    full, rest = queue_to(exporter, dropped), queue_to(exporter, dropped, delay_s=0.001)

    for span in spans(4):
        full.put(span)
    assert exporter.asked.wait(GIVE_UP_S)  # long before the delay
    exporter.asked.clear()
    rest.put(spans(1)[0])
    assert exporter.asked.wait(GIVE_UP_S)
    full.close(GIVE_UP_S)
    rest.close(GIVE_UP_S)

    assert exporter.sizes == [4, 1]


def test_a_worker_that_ends_does_not_wait_for_a_destination_that_is_away():
    exporter, dropped = HeldExporter(is_taken=False), Dropped()
    queue = queue_to(exporter, dropped)
    for span in spans(6):
        queue.put(span)
    assert exporter.asked.wait(GIVE_UP_S)

    queue.close(0.0)

    assert dropped.number == 6  # each once, although the destination then refuses those that it was asked to take


def every_kind_of_span() -> list[FinishedSpan]:
    """Spans with and without a parent, state, links, attributes of every type, and an error."""
    recorded = Recorded()
    tracer = recorded.tracer()
    remote = tracer.begin([("traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"), ("tracestate", b"a=1,b=2")])
    assert remote.span is not None
    values = ("text", 1, True, 1.0, -(2**40), ("a", "b"), (1, 2), "")
    attributes = {f"name{index}": value for index, value in enumerate(values)}
    tracer.record(
        names.PROCESS, remote.span, Interval(1.0, 2.5), attributes, of="in", state=remote.context.state, failed=True
    )
    tracer.record(names.READ, child_of(remote.span), Interval(1.25, 1.5), {"same": 1}, links=[root(), root()])
    tracer.record(names.MICRO_BATCH, root(), Interval(1.0, 1.0), {"same": True}, links=[remote.span])
    tracer.record(names.SEND, child_of(root()), Interval(2.0, 3.0), {"same": 1.0}, of="out")
    return recorded.finished


def test_spans_are_encoded_as_by_the_sdk():
    """Read back and compared, because equal messages may be written in more than one way."""
    finished = every_kind_of_span()
    theirs = encode_spans(list(map(as_sdk_span, finished)))
    ours = ExportTraceServiceRequest.FromString(encode_request(NOBODY, finished))
    for span in (*theirs.resource_spans[0].scope_spans[0].spans, *ours.resource_spans[0].scope_spans[0].spans):
        if span.status.code == 0:
            span.ClearField("status")  # an outcome that is not set may be there or not
    assert ours == theirs


class Endpoint(BaseHTTPRequestHandler):
    """Keeps the spans it receives."""

    bodies: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        self.bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_spans_reach_an_endpoint_with_the_standard_variables_obeyed(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}/base")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        exporter = OtlpExporter(Resource({"service.name": "us"}))
        finished = spans(3)
        is_taken = exporter.export(finished)
        exporter.shutdown()
        server.shutdown()
        thread.join()
    assert is_taken
    [(path, body)] = Endpoint.bodies
    assert path == "/base/v1/traces"
    (of_us,) = ExportTraceServiceRequest.FromString(gzip.decompress(body)).resource_spans
    assert of_us.resource.attributes[0].value.string_value == "us"
    received = of_us.scope_spans[0].spans
    assert [span.span_id for span in received] == [span.ids.span_id.to_bytes(8, "big") for span in finished]
    assert not exporter.export(finished)  # after its end it takes nothing


def test_a_span_is_a_line_of_otlp(tmp_path):
    (span,) = spans(1)

    document = json.loads(span_line(NOBODY, span))

    (written,) = document["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert written["traceId"] == f"{span.ids.trace_id:032x}"
    assert written["parentSpanId"] == f"{span.ids.parent_id:016x}"
    assert (written["name"], written["kind"], written["status"]) == ("send out", 4, {"code": 2})
    assert (written["startTimeUnixNano"], written["endTimeUnixNano"]) == ("1000000000", "2000000000")
    assert written["attributes"] == [
        {"key": "offset", "value": {"intValue": "0"}},
        {"key": "ids", "value": {"arrayValue": {"values": [{"stringValue": "a"}, {"stringValue": "b"}]}}},
        {"key": "share", "value": {"doubleValue": 0.5}},
        {"key": "is_new", "value": {"boolValue": True}},
    ]
    assert len(written["links"]) == 1


def test_a_span_file_takes_no_more_than_twice_its_size(tmp_path):
    path, (span,) = tmp_path / "spans.jsonl", spans(1)
    num_bytes = len(span_line(NOBODY, span))
    file = SpanFile(NOBODY, path, max_bytes=3 * num_bytes)

    for _ in range(20):
        assert file.export([span])
    file.shutdown()

    assert predecessor_of(path).stat().st_size == 3 * num_bytes
    assert path.stat().st_size == 2 * num_bytes
    assert set(tmp_path.iterdir()) == {path, predecessor_of(path)}


def test_a_span_file_goes_on_where_an_earlier_worker_ended(tmp_path):
    path = tmp_path / "spans.jsonl"
    for span in spans(2):
        file = SpanFile(NOBODY, path, max_bytes=1 << 20)
        file.export([span])
        file.shutdown()

    assert len(path.read_bytes().splitlines()) == 2


def test_a_span_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    with pytest.raises(Misconfigured, match="spans cannot be written to"):
        SpanFile(NOBODY, tmp_path / "none" / "spans.jsonl", max_bytes=1)


def test_with_nothing_set_nothing_is_sampled_and_no_thread_runs(monkeypatch):
    settings, metrics = RerankSettings(), Metrics()
    before = threading.active_count()

    with ExitStack() as stack:
        tracer = start_tracing("rerank", settings.telemetry(), metrics, lambda: 0.0, stack)
        assert start_metric_export("rerank", settings.telemetry(), metrics.registry, stack) is None
        assert threading.active_count() == before

    assert tracer.begin((("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),)).span is None


def test_a_span_file_alone_turns_tracing_on_and_the_sdks_switch_turns_it_off(tmp_path):
    path = tmp_path / "spans.jsonl"

    for is_disabled in (False, True):
        settings = RerankSettings(span_file=path, otel_sdk_disabled=str(is_disabled))
        with ExitStack() as stack:
            tracer = start_tracing("rerank", settings.telemetry(), Metrics(), lambda: 0.0, stack)
            assert (tracer.begin(()).span is None) == is_disabled


SDK_SAMPLERS = {
    "always_on": lambda ratio: ALWAYS_ON,
    "always_off": lambda ratio: ALWAYS_OFF,
    "traceidratio": TraceIdRatioBased,
    "parentbased_always_on": lambda ratio: DEFAULT_ON,
    "parentbased_always_off": lambda ratio: DEFAULT_OFF,
    "parentbased_traceidratio": ParentBasedTraceIdRatio,
}


@given(
    name=st.sampled_from(sorted(SDK_SAMPLERS)),
    ratio=st.floats(0, 1),
    trace_id=st.integers(1, 2**128 - 1),
    parent_is_sampled=st.sampled_from([None, True, False]),
)
def test_every_standard_sampler_decides_as_the_sdks_own_does(name, ratio, trace_id, parent_is_sampled):
    parent = Context()
    if parent_is_sampled is not None:
        remote = SpanContext(trace_id, 1, is_remote=True, trace_flags=TraceFlags(parent_is_sampled))
        parent = set_span_in_context(NonRecordingSpan(remote), parent)

    ours = Sampling.named(name, ratio).takes(trace_id, parent_is_sampled=parent_is_sampled)

    theirs = SDK_SAMPLERS[name](ratio).should_sample(parent, trace_id, "process").decision
    assert ours == (theirs is Decision.RECORD_AND_SAMPLE)


def test_the_resource_names_the_worker_unless_the_environment_names_another_service(monkeypatch):
    assert resource_of("rerank").attributes["service.name"] == "edje-rerank"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "team-a-rerank")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")

    attributes = resource_of("rerank").attributes

    assert attributes["service.name"] == "team-a-rerank"
    assert attributes["deployment.environment.name"] == "test"
    assert attributes["service.instance.id"]


def test_the_registry_is_converted_to_otlp():
    metrics = Metrics()
    metrics.count_event("ok")
    metrics.observe_batch(num_pairs=5, num_tokens=400, max_tokens=800, seconds=0.003)
    metrics.inflight_pairs.set(7)

    data = metrics_data(metrics.registry.collect(), Resource.get_empty(), start_ns=1, now_ns=2)

    told = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    (events,) = told["edje_events_total"].data.data_points
    assert (events.attributes, events.value, events.start_time_unix_nano) == ({"outcome": "ok"}, 1, 1)
    assert told["edje_events_total"].data.is_monotonic
    assert told["edje_inflight_pairs"].data.data_points[0].value == 7
    (batch,) = told["edje_batch_seconds"].data.data_points
    assert (batch.count, batch.sum, sum(batch.bucket_counts)) == (1, 0.003, 1)
    assert batch.bucket_counts[batch.explicit_bounds.index(0.005)] == 1
    assert len(batch.bucket_counts) == len(batch.explicit_bounds) + 1
    assert "edje_backlog_seconds" not in told


def test_metrics_are_exported_once_more_at_the_end():
    class Collected(MetricExporter):
        told: list[object]

        def export(self, metrics_data, timeout_millis=10_000, **kwargs) -> MetricExportResult:
            self.told.append(metrics_data)
            return MetricExportResult.SUCCESS

        def shutdown(self, timeout_millis=30_000, **kwargs) -> None:
            self.is_shut = True

        def force_flush(self, timeout_millis=10_000) -> bool:
            return True

    exporter = Collected()
    exporter.told = []
    export = MetricExport(Metrics().registry, exporter, Resource.get_empty(), interval_s=3600.0)
    assert export.is_running()

    export.close(GIVE_UP_S)

    assert len(exporter.told) == 1
    assert exporter.is_shut


def test_an_exporter_that_fails_ends_no_thread():
    class Failing:
        def __init__(self):
            self.num_left = 2
            self.called_twice = threading.Event()

        def export(self, data):
            self.num_left -= 1
            if self.num_left == 0:
                self.called_twice.set()
            raise ValueError("the address has no scheme")

        def shutdown(self):
            """Nothing is held open."""

    exporter = Failing()
    export = MetricExport(Metrics().registry, exporter, NOBODY, interval_s=0.05)

    assert exporter.called_twice.wait(GIVE_UP_S)
    assert export.is_running()
    export.close(GIVE_UP_S)


def test_a_span_file_in_the_settings_is_filled_by_the_tracer(tmp_path: Path):
    path = tmp_path / "spans.jsonl"
    with ExitStack() as stack:
        tracer = start_tracing("rerank", RerankSettings(span_file=path).telemetry(), Metrics(), lambda: 0.0, stack)
        tracer.record(names.MICRO_BATCH, root(), Interval(0.0, 1.0), {})

    assert b"micro-batch" in path.read_bytes()

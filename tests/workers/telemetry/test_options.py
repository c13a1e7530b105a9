"""Standard OTEL_* variables: an invalid value is reported and ignored, whatever other SDKs may have wanted with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.telemetry.options import OptionsReader, OtelValues, TelemetryOptions


def read(*, endpoint: bool = True, **values: str) -> tuple[TelemetryOptions, list[str]]:
    reader = OptionsReader()
    options = reader.read(
        OtelValues(**values),
        has_traces_endpoint=endpoint,
        has_metrics_endpoint=endpoint,
        span_file=Path("spans"),
        span_file_bytes=1,
    )
    return options, reader.warnings


def test_without_variables_the_defaults_of_the_specification_are_used():
    options, warnings = read()

    assert warnings == []
    assert options == TelemetryOptions(
        sends_spans=True,
        sends_metrics=True,
        sampler="parentbased_always_on",
        sampler_ratio=1.0,
        max_queue_spans=2048,
        max_batch_spans=512,
        span_delay_s=5.0,
        metric_interval_s=60.0,
        span_file=Path("spans"),
        span_file_bytes=1,
    )


def test_without_an_endpoint_nothing_is_sent():
    options, _ = read(endpoint=False)

    assert not options.sends_spans
    assert not options.sends_metrics


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"sdk_disabled": "TRUE"}, "sends_spans", False),
        ({"sdk_disabled": "true"}, "span_file", None),
        ({"traces_exporter": "none"}, "sends_spans", False),
        ({"metrics_exporter": "NONE"}, "sends_metrics", False),
        ({"metrics_exporter": "prometheus"}, "sends_metrics", False),
        ({"metrics_exporter": "prometheus,otlp"}, "sends_metrics", True),
        ({"sampler": "ALWAYS_ON"}, "sampler", "always_on"),
        ({"sampler": " traceidratio ", "sampler_arg": "0.25"}, "sampler_ratio", 0.25),
        ({"sampler": "always_on", "sampler_arg": "of another sampler"}, "sampler_ratio", 1.0),
        ({"max_queue_spans": "", "max_batch_spans": " 64 "}, "max_batch_spans", 64),
    ],
)
def test_a_valid_value_is_used_without_a_warning(values, field, value):
    options, warnings = read(**values)

    assert getattr(options, field) == value
    assert warnings == []


@pytest.mark.parametrize(
    ("values", "field", "value", "sentence"),
    [
        ({"sdk_disabled": "disabled"}, "sends_spans", True, "OTEL_SDK_DISABLED=disabled is ignored; false is used"),
        (
            {"sampler": "xray", "sampler_arg": "endpoint=http://localhost:2000"},
            "sampler",
            "parentbased_always_on",
            "OTEL_TRACES_SAMPLER=xray is ignored; parentbased_always_on is used",
        ),
        (
            {"sampler": "traceidratio", "sampler_arg": "25%"},
            "sampler_ratio",
            1.0,
            "OTEL_TRACES_SAMPLER_ARG=25% is ignored; 1.0 is used",
        ),
        (
            {"sampler": "traceidratio", "sampler_arg": "nan"},
            "sampler_ratio",
            1.0,
            "OTEL_TRACES_SAMPLER_ARG=nan is ignored; 1.0 is used",
        ),
        (
            {"max_queue_spans": "-1"},
            "max_queue_spans",
            2048,
            "OTEL_BSP_MAX_QUEUE_SIZE=-1 is ignored; 2048 is used",
        ),
        (
            {"span_delay_ms": "5s"},
            "span_delay_s",
            5.0,
            "OTEL_BSP_SCHEDULE_DELAY=5s is ignored; 5000 is used",
        ),
        (
            {"metric_interval_ms": "\u0663"},
            "metric_interval_s",
            60.0,
            "OTEL_METRIC_EXPORT_INTERVAL=\u0663 is ignored; 60000 is used",
        ),
        (
            {"max_queue_spans": "256"},
            "max_batch_spans",
            256,
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=512 is larger than OTEL_BSP_MAX_QUEUE_SIZE=256; batches of 256 are sent",
        ),
        (
            {"traces_exporter": "jaeger"},
            "sends_spans",
            True,
            "OTEL_TRACES_EXPORTER=jaeger is ignored; otlp is used",
        ),
        (
            {"protocol": "grpc"},
            "sends_spans",
            True,
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc is ignored; http/protobuf is used",
        ),
    ],
)
def test_an_invalid_value_is_reported_and_ignored(values, field, value, sentence):
    options, warnings = read(**values)

    assert getattr(options, field) == value
    assert warnings == [sentence]


@given(st.fixed_dictionaries({}, optional={name: st.text() for name in OtelValues.__dataclass_fields__}))
def test_no_value_stops_a_worker(values):
    options, _ = read(**values)

    assert 0 < options.max_batch_spans <= options.max_queue_spans
    assert 0 <= options.sampler_ratio <= 1

"""Reads the standard OTEL_* variables as the specification requires: an invalid value is logged and ignored.

Pure: takes the values and returns the options with a sentence for each ignored value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from workers.telemetry.sampling import SamplerName

Signal = Literal["traces", "metrics"]

_SAMPLERS: tuple[str, ...] = get_args(SamplerName)
_DEFAULT_SAMPLER: SamplerName = "parentbased_always_on"


@dataclass(frozen=True, slots=True)
class OtelValues:
    """The unparsed values of the variables; None or "" if unset."""

    sdk_disabled: str | None = None
    traces_exporter: str | None = None
    metrics_exporter: str | None = None
    protocol: str | None = None
    sampler: str | None = None
    sampler_arg: str | None = None
    max_queue_spans: str | None = None
    max_batch_spans: str | None = None
    span_delay_ms: str | None = None
    metric_interval_ms: str | None = None


@dataclass(frozen=True, slots=True)
class TelemetryOptions:
    """The settings of sampling and of the exports of spans and metrics."""

    sends_spans: bool  # to the collector that OTEL_EXPORTER_OTLP_* name
    sends_metrics: bool
    sampler: SamplerName
    sampler_ratio: float
    max_queue_spans: int
    max_batch_spans: int
    span_delay_s: float
    metric_interval_s: float
    span_file: Path | None
    span_file_bytes: int


class OptionsReader:
    """Reads values and collects a sentence for each one that is ignored."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def read(
        self,
        values: OtelValues,
        *,
        has_traces_endpoint: bool,
        has_metrics_endpoint: bool,
        span_file: Path | None,
        span_file_bytes: int,
    ) -> TelemetryOptions:
        """Return the options; an endpoint is set if any of its variables is."""
        is_disabled = self._flag("OTEL_SDK_DISABLED", values.sdk_disabled)
        sends_spans = has_traces_endpoint and self._exports("OTEL_TRACES_EXPORTER", values.traces_exporter)
        sends_metrics = has_metrics_endpoint and self._exports("OTEL_METRICS_EXPORTER", values.metrics_exporter)
        if (sends_spans or sends_metrics) and values.protocol and values.protocol.strip().lower() == "grpc":
            self._ignore("OTEL_EXPORTER_OTLP_PROTOCOL", values.protocol, "http/protobuf")
        sampler, sampler_ratio = self._sampler(values.sampler, values.sampler_arg)
        max_queue_spans = self._count("OTEL_BSP_MAX_QUEUE_SIZE", values.max_queue_spans, 2048)
        max_batch_spans = self._count("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", values.max_batch_spans, 512)
        if max_batch_spans > max_queue_spans:
            self.warnings.append(
                f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE={max_batch_spans} is larger than "
                f"OTEL_BSP_MAX_QUEUE_SIZE={max_queue_spans}; batches of {max_queue_spans} are sent"
            )
        return TelemetryOptions(
            sends_spans=sends_spans and not is_disabled,
            sends_metrics=sends_metrics and not is_disabled,
            sampler=sampler,
            sampler_ratio=sampler_ratio,
            max_queue_spans=max_queue_spans,
            max_batch_spans=min(max_batch_spans, max_queue_spans),
            span_delay_s=self._count("OTEL_BSP_SCHEDULE_DELAY", values.span_delay_ms, 5000) / 1000,
            metric_interval_s=self._count("OTEL_METRIC_EXPORT_INTERVAL", values.metric_interval_ms, 60_000) / 1000,
            span_file=None if is_disabled else span_file,
            span_file_bytes=span_file_bytes,
        )

    def _ignore(self, name: str, value: str, used: object) -> None:
        self.warnings.append(f"{name}={value} is ignored; {used} is used")

    def _flag(self, name: str, value: str | None) -> bool:
        text = (value or "").strip().lower()
        if text not in ("", "true", "false"):
            self._ignore(name, value or "", "false")
        return text == "true"

    def _exports(self, name: str, value: str | None) -> bool:
        """Whether OTLP is among the exporters; Prometheus is always served, and no others are supported."""
        wanted = {word.strip().lower() for word in (value or "otlp").split(",") if word.strip()}
        unknown = wanted - {"otlp", "none", "prometheus"}
        if unknown:
            used = "otlp" if "otlp" in wanted or wanted == unknown else "none of them"
            self._ignore(name, ",".join(sorted(unknown)), used)
        return "otlp" in wanted or wanted == unknown

    def _sampler(self, name: str | None, ratio: str | None) -> tuple[SamplerName, float]:
        text = (name or _DEFAULT_SAMPLER).strip().lower()
        if text not in _SAMPLERS:
            self._ignore("OTEL_TRACES_SAMPLER", name or "", _DEFAULT_SAMPLER)
            return _DEFAULT_SAMPLER, 1.0  # the argument belongs to the unknown sampler
        if not text.endswith("traceidratio"):
            return cast(SamplerName, text), 1.0
        return cast(SamplerName, text), self._ratio(ratio)

    def _ratio(self, value: str | None) -> float:
        if not (value or "").strip():
            return 1.0
        try:
            ratio = float(value or "")
        except ValueError:
            ratio = math.nan
        if not 0 <= ratio <= 1:
            self._ignore("OTEL_TRACES_SAMPLER_ARG", value or "", 1.0)
            return 1.0
        return ratio

    def _count(self, name: str, value: str | None, default: int) -> int:
        text = (value or "").strip()
        if not text:
            return default
        if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
            self._ignore(name, text, default)
            return default
        return int(text)

"""Encodes a span as a line of OTLP in JSON, the format of the OpenTelemetry Collector's file exporter. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from opentelemetry.sdk.resources import Resource

from workers.ports import SpanIds
from workers.telemetry.finished_span import SCOPE, FinishedSpan
from workers.telemetry.otlp_protobuf import KINDS


def span_line(resource: Resource, span: FinishedSpan) -> bytes:
    """Return the span with its resource, ended by a line feed."""
    document = {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(resource.attributes)},
                "scopeSpans": [{"scope": {"name": SCOPE}, "spans": [_span(span)]}],
            }
        ]
    }
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


def _span(span: FinishedSpan) -> dict[str, Any]:
    written: dict[str, Any] = {
        **_ids(span.ids),
        "name": span.name,
        "kind": KINDS[span.what.kind],
        "startTimeUnixNano": str(span.started_ns),
        "endTimeUnixNano": str(span.ended_ns),
        "attributes": _attributes(span.attributes),
    }
    if span.ids.parent_id is not None:
        written["parentSpanId"] = f"{span.ids.parent_id:016x}"
    if span.links:
        written["links"] = [_ids(link) for link in span.links]
    if span.failed:
        written["status"] = {"code": 2}
    return written


def _ids(ids: SpanIds) -> dict[str, str]:
    return {"traceId": f"{ids.trace_id:032x}", "spanId": f"{ids.span_id:016x}"}


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in attributes.items()]


def _value(value: object) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}  # JSON numbers do not hold 64 bits
        case float():
            return {"doubleValue": value}
        case Sequence() if not isinstance(value, str):
            return {"arrayValue": {"values": [_value(part) for part in value]}}
        case _:
            return {"stringValue": str(value)}

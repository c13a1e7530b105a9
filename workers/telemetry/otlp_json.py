"""One span as a line of OTLP in JSON: what the OpenTelemetry Collector's file exporter writes too.

So that whoever reads our files reads the Collector's, and the other way round. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, StatusCode

from workers.telemetry.otlp_protobuf import KINDS


def span_line(span: ReadableSpan) -> bytes:
    """The span with its resource, ended by a line feed."""
    scope = span.instrumentation_scope
    document = {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(span.resource.attributes)},
                "scopeSpans": [{"scope": {"name": scope.name if scope else ""}, "spans": [_span(span)]}],
            }
        ]
    }
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


def _span(span: ReadableSpan) -> dict[str, Any]:
    written: dict[str, Any] = {
        **_ids(span.context),
        "name": span.name,
        "kind": KINDS[span.kind],
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes or {}),
    }
    if span.parent is not None:
        written["parentSpanId"] = f"{span.parent.span_id:016x}"
    if span.links:
        written["links"] = [_ids(link.context) for link in span.links]
    if span.status.status_code is StatusCode.ERROR:
        written["status"] = {"code": 2}
    return written


def _ids(context: SpanContext) -> dict[str, str]:
    return {"traceId": f"{context.trace_id:032x}", "spanId": f"{context.span_id:016x}"}


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

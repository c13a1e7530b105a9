"""Encodes spans of one worker as an OTLP request in protobuf, in a fraction of the SDK encoder's time.

The export shares the interpreter lock with the loop, so its time delays scoring. All spans have one resource and scope,
and most attributes recur: each of these is encoded once (docs/LOG.md has the figures). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, SpanFlags, Status
from opentelemetry.sdk.resources import Resource

from workers.telemetry.finished_span import SCOPE, FinishedSpan

#: Numbers of span kinds and statuses in the protocol.
KINDS = {
    "INTERNAL": Span.SPAN_KIND_INTERNAL,
    "CLIENT": Span.SPAN_KIND_CLIENT,
    "PRODUCER": Span.SPAN_KIND_PRODUCER,
    "SERVER": Span.SPAN_KIND_SERVER,
    "CONSUMER": Span.SPAN_KIND_CONSUMER,
}
_ERROR = Status(code=Status.STATUS_CODE_ERROR)
_LOCAL = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE = _LOCAL | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
#: Attributes to cache: names, topics, statuses, digests and small numbers recur; ids do not.
_MAX_KNOWN_ATTRIBUTES = 4096


def encode_request(resource: Resource, spans: Sequence[FinishedSpan]) -> bytes:
    """Return spans of one resource as an `ExportTraceServiceRequest`."""
    request = ExportTraceServiceRequest()
    of_resource = request.resource_spans.add()
    of_resource.resource.attributes.extend(_attribute(*item) for item in resource.attributes.items())
    of_scope = of_resource.scope_spans.add()
    of_scope.scope.name = SCOPE
    add = of_scope.spans.add
    for span in spans:
        _fill(add, span)
    encoded: bytes = request.SerializeToString()
    return encoded


def _fill(add: Callable[[], Span], span: FinishedSpan) -> None:
    trace_id, span_id, parent_id = span.ids
    filled = add()
    filled.trace_id = trace_id.to_bytes(16, "big")
    filled.span_id = span_id.to_bytes(8, "big")
    filled.flags = _LOCAL
    if parent_id is not None:
        filled.parent_span_id = parent_id.to_bytes(8, "big")
        if span.parent_is_remote:
            filled.flags = _REMOTE
    if span.state:
        filled.trace_state = span.state.decode()
    filled.name = span.name
    filled.kind = KINDS[span.what.kind]
    filled.start_time_unix_nano = span.started_ns
    filled.end_time_unix_nano = span.ended_ns
    if span.attributes:
        filled.attributes.extend([_attribute(*item) for item in span.attributes.items()])
    for link in span.links:
        filled.links.add(
            trace_id=link.trace_id.to_bytes(16, "big"), span_id=link.span_id.to_bytes(8, "big"), flags=_LOCAL
        )
    if span.failed:
        filled.status.CopyFrom(_ERROR)


@lru_cache(_MAX_KNOWN_ATTRIBUTES, typed=True)  # typed: 1, 1.0 and True are equal keys but different values
def _attribute(name: str, value: Any) -> KeyValue:
    return KeyValue(key=name, value=_value(value))


def _value(value: object) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case Sequence() if not isinstance(value, str):
            return AnyValue(array_value=ArrayValue(values=[_value(part) for part in value]))
        case _:
            return AnyValue(string_value=str(value))

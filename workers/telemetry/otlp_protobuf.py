"""Many spans of one worker as an OTLP request in protobuf, for a fraction of what the SDK's encoder takes.

Exporting shares the interpreter with the loop, so its time is taken from scoring. All spans come from one resource and
scope, and most attributes were seen before: what stays the same is encoded once (docs/LOG.md has the figures). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, SpanFlags, Status
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

#: The numbers of the protocol, which are not those of the API.
KINDS = {
    SpanKind.INTERNAL: Span.SPAN_KIND_INTERNAL,
    SpanKind.SERVER: Span.SPAN_KIND_SERVER,
    SpanKind.CLIENT: Span.SPAN_KIND_CLIENT,
    SpanKind.PRODUCER: Span.SPAN_KIND_PRODUCER,
    SpanKind.CONSUMER: Span.SPAN_KIND_CONSUMER,
}
_ERROR = Status(code=Status.STATUS_CODE_ERROR)
_LOCAL = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE = _LOCAL | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
#: Names, topics, statuses, digests and small numbers recur; ids pass through.
_MAX_KNOWN_ATTRIBUTES = 4096


def encode_request(spans: Sequence[ReadableSpan]) -> bytes:
    """One or more spans of the same resource and instrumentation scope, as `ExportTraceServiceRequest`."""
    first = spans[0]
    request = ExportTraceServiceRequest()
    of_resource = request.resource_spans.add()
    of_resource.resource.attributes.extend(_attribute(*item) for item in first.resource.attributes.items())
    of_scope = of_resource.scope_spans.add()
    if first.instrumentation_scope is not None:
        of_scope.scope.name = first.instrumentation_scope.name
    add = of_scope.spans.add
    for span in spans:
        _fill(add, span)
    encoded: bytes = request.SerializeToString()
    return encoded


def _fill(add: Callable[[], Span], span: ReadableSpan) -> None:
    context, parent = span.context, span.parent
    filled = add()
    filled.trace_id = context.trace_id.to_bytes(16, "big")
    filled.span_id = context.span_id.to_bytes(8, "big")
    if context.trace_state:
        filled.trace_state = context.trace_state.to_header()
    if parent is not None:
        filled.parent_span_id = parent.span_id.to_bytes(8, "big")
    filled.flags = _flags(parent)
    filled.name = span.name
    filled.kind = KINDS[span.kind]
    filled.start_time_unix_nano = span.start_time or 0
    filled.end_time_unix_nano = span.end_time or 0
    if span.attributes:
        filled.attributes.extend([_attribute(*item) for item in span.attributes.items()])
    for link in span.links:
        filled.links.add(
            trace_id=link.context.trace_id.to_bytes(16, "big"),
            span_id=link.context.span_id.to_bytes(8, "big"),
            flags=_flags(link.context),
        )
    if span.status.status_code is StatusCode.ERROR:
        filled.status.CopyFrom(_ERROR)


def _flags(context: SpanContext | None) -> int:
    return _REMOTE if context is not None and context.is_remote else _LOCAL


@lru_cache(_MAX_KNOWN_ATTRIBUTES, typed=True)  # 1, 1.0 and True are one key, and three values
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

"""The trace context in the headers of a message, against the propagator of the OpenTelemetry API."""

from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from workers.telemetry.trace_context import (
    MAX_STATE_BYTES,
    TraceContext,
    context_headers,
    names_context,
    new_context,
    read_context,
    trace_id_of,
)

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01".encode()


def span_context_by_opentelemetry(headers) -> trace.SpanContext:
    context = TraceContextTextMapPropagator().extract({name: value.decode("latin-1") for name, value in headers})
    return trace.get_current_span(context).get_span_context()


def test_a_context_is_read_whatever_else_the_message_carries():
    headers = (("content-type", b"application/json"), ("traceparent", PARENT), ("tracestate", b"vendor=1"))

    assert read_context(headers) == TraceContext(TRACE.encode(), SPAN.encode(), 1, b"vendor=1")
    assert read_context(headers).is_sampled
    assert trace_id_of(headers) == TRACE


def test_a_context_that_is_written_is_the_one_that_was_read():
    headers = (("traceparent", PARENT), ("tracestate", b"vendor=1"))

    assert context_headers(read_context(headers)) == headers


def test_a_new_context_is_valid_and_unlike_any_other():
    one, other = (span_context_by_opentelemetry(context_headers(new_context())) for _ in range(2))

    assert one.is_valid
    assert other.is_valid
    assert one.trace_id != other.trace_id


def test_a_message_without_a_context_differs_from_one_with_an_invalid_context():
    assert read_context((("tracestate", b"vendor=1"),)) is None
    assert not names_context((("tracestate", b"vendor=1"),))
    assert read_context((("traceparent", b"garbage"),)) is None
    assert names_context((("traceparent", b"garbage"),))


def test_of_two_contexts_the_last_counts():
    other = PARENT.replace(b"0af", b"1bf")

    assert trace_id_of((("traceparent", PARENT), ("traceparent", other))) == TRACE.replace("0af", "1bf")


def test_a_state_too_long_or_unprintable_is_left_out():
    for state in (b"a=" + b"x" * MAX_STATE_BYTES, b"a=\xff", b"a=1\n"):
        assert read_context((("traceparent", PARENT), ("tracestate", state))).state == b""


parents = st.from_regex(r"[ \t]?[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[a-z]{1,3}|[ \t]?)", fullmatch=True)


@given(parents.map(str.encode) | st.binary(max_size=80))
@example(PARENT)
@example(PARENT + b" ")
@example(PARENT + b"-more")
@example(b"01" + PARENT[2:] + b"-more")
@example(b"ff" + PARENT[2:])
@example(PARENT.upper())
@example(PARENT.replace(SPAN.encode(), b"0" * 16))
@example(PARENT.replace(TRACE.encode(), b"0" * 32))
@example(b"")
def test_the_same_contexts_are_valid_as_for_opentelemetry(value):
    headers = (("traceparent", value),)
    theirs = span_context_by_opentelemetry(headers)

    context = read_context(headers)
    assert (context is not None) == theirs.is_valid
    if context is not None:
        written = span_context_by_opentelemetry(context_headers(context))
        assert (written.trace_id, written.span_id) == (theirs.trace_id, theirs.span_id)
        assert written.trace_flags == theirs.trace_flags == context.flags

"""The trace context from a message to its answer, against the propagator of the OpenTelemetry API."""

from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from workers.tracing import MAX_STATE_BYTES, reply_headers, trace_id_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01".encode()


def span_context_by_opentelemetry(headers) -> trace.SpanContext:
    context = TraceContextTextMapPropagator().extract({name: value.decode("latin-1") for name, value in headers})
    return trace.get_current_span(context).get_span_context()


def test_an_answer_stays_in_the_trace_with_a_span_of_its_own():
    headers = (("content-type", b"application/json"), ("traceparent", PARENT), ("tracestate", b"vendor=1"))

    answer = span_context_by_opentelemetry(reply_headers(headers))

    assert trace.format_trace_id(answer.trace_id) == TRACE == trace_id_of(headers)
    assert trace.format_span_id(answer.span_id) != SPAN
    assert answer.trace_flags == trace.TraceFlags.SAMPLED
    assert answer.trace_state.get("vendor") == "1"


def test_nothing_but_the_trace_context_is_carried_over():
    headers = (("content-type", b"application/msgpack"), ("traceparent", PARENT), ("baggage", b"a=b"))

    assert [name for name, _ in reply_headers(headers)] == ["traceparent"]


def test_a_message_without_context_begins_a_trace_of_its_own():
    answers = [span_context_by_opentelemetry(reply_headers((("tracestate", b"vendor=1"),))) for _ in range(2)]

    assert trace_id_of(()) is None
    assert all(answer.is_valid and not answer.trace_state for answer in answers)
    assert answers[0].trace_id != answers[1].trace_id


def test_of_two_contexts_the_last_counts():
    other = PARENT.replace(b"0af", b"1bf")

    assert trace_id_of((("traceparent", PARENT), ("traceparent", other))) == TRACE.replace("0af", "1bf")


def test_a_state_too_long_or_unprintable_is_left_out():
    for state in (b"a=" + b"x" * MAX_STATE_BYTES, b"a=\xff", b"a=1\n"):
        assert len(reply_headers((("traceparent", PARENT), ("tracestate", state)))) == 1


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
def test_what_is_a_context_and_what_is_not_is_what_opentelemetry_says(value):
    headers = (("traceparent", value),)
    theirs = span_context_by_opentelemetry(headers)

    assert trace_id_of(headers) == (trace.format_trace_id(theirs.trace_id) if theirs.is_valid else None)
    answer = span_context_by_opentelemetry(reply_headers(headers))
    assert answer.is_valid
    if theirs.is_valid:
        assert (answer.trace_id, answer.trace_flags) == (theirs.trace_id, theirs.trace_flags)

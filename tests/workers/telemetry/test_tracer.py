"""Which messages are traced, what goes on from them, and that spans are made of the times they are given."""

from opentelemetry.trace import SpanKind, StatusCode

from tracing_harness import Recorded
from workers.ports import Interval
from workers.telemetry import names
from workers.telemetry.sampling import Sampling
from workers.telemetry.trace_context import read_context
from workers.telemetry.tracer import Tracer, child_of, root

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-01".encode()), ("tracestate", b"vendor=1"))
UNSAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-00".encode()),)


def test_a_sampled_message_is_recorded_under_its_producers_span():
    trace = Recorded().tracer().begin(SAMPLED)

    assert (f"{trace.span.trace_id:032x}", f"{trace.span.parent_id:016x}") == (TRACE, SPAN)
    assert trace.trace_id == TRACE
    assert trace.exemplar() == {"trace_id": TRACE}


def test_the_answer_to_a_sampled_message_carries_the_span_of_its_sending():
    trace = Recorded().tracer().begin(SAMPLED)

    headers, sent = trace.outgoing()

    context = read_context(headers)
    assert (context.trace_id.decode(), int(context.span_id, 16)) == (TRACE, sent.span_id)
    assert sent.parent_id == trace.span.span_id
    assert context.is_sampled
    assert context.state == b"vendor=1"
    assert trace.outgoing()[1] != sent  # each message has its own


def test_a_message_that_its_producer_does_not_sample_goes_on_so():
    trace = Recorded().tracer().begin(UNSAMPLED)

    headers, sent = trace.outgoing()

    assert (trace.span, sent, trace.exemplar()) == (None, None, None)
    assert not read_context(headers).is_sampled
    assert trace.trace_id == TRACE


def test_without_tracing_the_producers_context_passes_unchanged():
    assert Tracer.off().begin(SAMPLED).outgoing() == (SAMPLED, None)


def test_without_tracing_a_message_without_context_still_gets_an_id_that_logs_can_name():
    headers, _ = Tracer.off().begin(()).outgoing()

    assert not read_context(headers).is_sampled


def test_a_malformed_traceparent_starts_a_new_trace_and_is_counted():
    recorded = Recorded()
    tracer = recorded.tracer()

    trace = tracer.begin((("traceparent", b"00-" + b"0" * 32 + b"-" + b"1" * 16 + b"-01"),))

    assert recorded.num_bad_contexts == 1
    assert trace.span.parent_id is None
    assert trace.span.trace_id != 0
    tracer.begin(())
    tracer.begin(SAMPLED)
    assert recorded.num_bad_contexts == 1


def test_a_malformed_traceparent_is_counted_without_tracing_as_well():
    counted = []

    Tracer.off(lambda: counted.append(1)).begin((("traceparent", b"garbage"),))

    assert counted == [1]


def test_a_ratio_decides_only_for_traces_without_a_decision_of_the_producer():
    tracer = Recorded().tracer(sampling=Sampling.named("parentbased_traceidratio", 0.1))

    num_sampled = sum(tracer.begin(()).span is not None for _ in range(2000))

    assert 100 < num_sampled < 320
    assert tracer.begin(SAMPLED).span is not None
    assert tracer.begin(UNSAMPLED).span is None


def test_a_sampler_that_does_not_ask_the_producer_decides_alone():
    assert Recorded().tracer(sampling=Sampling.named("always_on", 0.0)).begin(UNSAMPLED).span is not None
    assert Recorded().tracer(sampling=Sampling.named("traceidratio", 0.0)).begin(SAMPLED).span is None
    headers, _ = Recorded().tracer(sampling=Sampling.named("traceidratio", 0.0)).begin(SAMPLED).outgoing()
    assert not read_context(headers).is_sampled


def test_a_span_has_the_times_it_was_given_in_the_clock_of_the_world():
    recorded = Recorded()
    tracer = recorded.tracer(lambda: 100.0, wall_ns=lambda: 5_000_000_000)
    parent = root()

    tracer.record(
        names.SEND, child_of(parent), Interval(99.0, 100.5), {"a": 1}, of="replies", links=[root()], failed=True
    )

    (span,) = recorded.spans
    assert (span.name, span.kind) == ("send replies", SpanKind.PRODUCER)
    assert (span.start_time, span.end_time) == (4_000_000_000, 5_500_000_000)
    assert span.parent.span_id == parent.span_id
    assert span.status.status_code is StatusCode.ERROR
    assert len(span.links) == 1


def test_a_wall_clock_that_was_set_is_followed():
    recorded = Recorded()
    times = iter([0, 1_000_000_000])
    tracer = recorded.tracer(lambda: 0.0, wall_ns=lambda: next(times))

    tracer.synchronise()
    tracer.record(names.MICRO_BATCH, root(), Interval(0.0, 1.0), {})

    assert recorded.spans[0].start_time == 1_000_000_000

"""The spans of rerank requests, their links, and that they agree with the timings of the reply."""

from __future__ import annotations

import pytest
from opentelemetry.trace import StatusCode

from rerank_harness import NAN_IMAGE, PARTITION, Engine, Rig, request
from tracing_harness import Recorded, links, seconds
from trt.contract import DeviceCopies
from workers.ports import Interval, Poll, Record
from workers.telemetry import names

TRACE = "a" * 32
SAMPLED = (("traceparent", f"00-{TRACE}-{'b' * 16}-01".encode()),)
UNSAMPLED = (("traceparent", f"00-{'c' * 32}-{'d' * 16}-00".encode()),)
PROCESS = f"process {PARTITION.topic}"


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def rig_over(recorded: Recorded, **settings) -> Rig:
    rig = Rig(make_tracer=lambda rig: recorded.tracer(lambda: rig.now), **settings)
    rig.put({"i1": 1, "i2": 2, "nan": NAN_IMAGE})
    return rig


def run_slowly(rig: Rig) -> None:
    """A hundredth of a second for everything that takes time."""
    rig.turn()
    while rig.job.num_active():
        rig.now += 0.01
        if rig.fetches.waiting:
            rig.fetches.land()
        elif rig.executor.waiting:
            rig.executor.run_next()
        rig.turn()


def test_the_stages_of_the_reply_are_the_stages_of_the_trace(recorded):
    rig = rig_over(recorded)
    rig.now += 1
    poll = Poll(Interval(rig.now - 0.05, rig.now - 0.02), num_records=1)
    sent = request(["i1", "i2"])
    record = rig.send(sent, SAMPLED)
    rig.job.drop({PARTITION})
    rig.job.accept(Record(PARTITION, 1, b"key", record.value, SAMPLED, 0, poll), rig.now)
    run_slowly(rig)

    process = recorded.one(PROCESS)
    stages = {span.name: seconds(span) for span in recorded.under(process) if span.name in names.REQUEST_STAGES}
    timings = rig.reply().timings_ms
    total_ms = timings.pop("total")
    assert {name: ms / 1000 for name, ms in timings.items() if ms} == pytest.approx(stages, abs=1e-6)
    assert seconds(process) * 1000 == pytest.approx(total_ms, abs=1e-3)
    assert sum(timings.values()) == pytest.approx(total_ms, abs=1e-3)
    assert timings["inbox"] == pytest.approx(20, abs=1e-3)


def test_the_metrics_of_the_stages_are_those_of_the_reply(recorded):
    rig = rig_over(recorded)
    rig.send(request(["i1", "i2"]), SAMPLED)
    run_slowly(rig)

    for stage, ms in rig.reply().timings_ms.items():
        if stage != "total":
            assert rig.metric("edje_stage_seconds_sum", stage=stage) == pytest.approx(ms / 1000, abs=1e-6)


def test_a_request_is_processed_under_its_producer_with_what_it_came_to(recorded):
    rig = rig_over(recorded)
    rig.send(request(["i1", "none"]), SAMPLED)
    rig.run()

    process = recorded.one(PROCESS)
    assert f"{process.context.trace_id:032x}" == TRACE
    assert f"{process.parent.span_id:016x}" == "b" * 16
    said = dict(process.attributes)
    assert said[names.CONVERSATION.name] == "r1"
    assert (said[names.STATUS.name], said[names.CANDIDATES.name], said[names.MISSING.name]) == ("partial", 2, 1)
    assert said[names.OFFSET.name] == 0
    assert names.ERROR_TYPE.name not in said


def test_requests_that_share_a_micro_batch_are_linked_through_one_span_of_it(recorded):
    rig = rig_over(recorded)
    rig.send(request(["i1"], request_id="one"), SAMPLED)
    rig.send(request(["i2"], request_id="two"), SAMPLED)
    rig.send(request(["i1"], request_id="unseen"), UNSAMPLED)
    rig.run()

    batch = recorded.one("micro-batch")
    processed = recorded.named(PROCESS)
    assert len(processed) == 2
    assert links(batch) == {span.context.span_id for span in processed}
    assert all(links(span) == {batch.context.span_id} for span in processed)
    assert batch.parent is None
    assert set(batch.attributes[names.REQUEST_IDS.name]) == {"one", "two", "unseen"}
    assert {span.name for span in recorded.under(batch)} == {"encode queries", "score pairs"}


def test_a_request_in_several_batches_is_linked_to_each(recorded):
    rig = rig_over(recorded, piece_pairs=1, max_batch_pairs=1)
    rig.send(request(["i1", "i2"]), SAMPLED)
    rig.run()

    batches = {span.context.span_id for span in recorded.named("micro-batch")}
    assert len(batches) == 2
    assert links(recorded.one(PROCESS)) == batches


def test_a_read_of_blobs_is_one_span_linked_to_every_request_that_waits_for_it(recorded):
    rig = rig_over(recorded)
    rig.send(request(["i1"], request_id="one"), SAMPLED)
    rig.turn()
    rig.send(request(["i1"], request_id="two"), SAMPLED)
    run_slowly(rig)

    read = recorded.one("MGET")
    one, two = (
        next(span for span in recorded.named(PROCESS) if span.attributes[names.CONVERSATION.name] == name)
        for name in ("one", "two")
    )
    assert read.parent.span_id == one.context.span_id
    assert links(read) == {two.context.span_id}
    assert read.attributes[names.DB_BATCH.name] == 1


def test_messages_that_are_not_sampled_have_no_spans(recorded):
    rig = rig_over(recorded)
    rig.send(request(["i1", "none"]), UNSAMPLED)
    rig.send(b"no event at all", UNSAMPLED)
    rig.run()

    assert recorded.spans == []


@pytest.mark.parametrize(
    ("sent", "status", "error"),
    [
        (request(["i1"], deadline="2001-01-01T00:00:00Z"), "expired", "expired"),
        (request(["nan"]), "error", "score_not_finite"),
        (request(["i1"], model="m2"), "error", "model_not_served"),
        (b"no event at all", "dead_letter", "undecodable"),
    ],
)
def test_a_request_that_ends_without_a_ranking_records_the_reason(recorded, sent, status, error):
    rig = rig_over(recorded)
    rig.send(sent, SAMPLED, key=None)
    rig.run()

    process = recorded.one(PROCESS)
    assert (process.attributes[names.STATUS.name], process.attributes[names.ERROR_TYPE.name]) == (status, error)
    assert process.status.status_code is StatusCode.ERROR
    assert all("total" in reply.timings_ms for reply in rig.replies())


def test_a_request_that_expires_while_it_waits_shows_what_for(recorded):
    rig = rig_over(recorded)
    rig.store.away = True
    rig.send(request(["i1"], deadline="2027-01-15T08:00:01Z"), SAMPLED)
    rig.run()

    timings = rig.reply().timings_ms
    assert rig.reply().status == "expired"
    assert timings["fetch"] == pytest.approx(timings["total"])
    assert "score" not in timings


def test_a_poll_is_one_span_linked_to_each_sampled_producer(recorded):
    rig = rig_over(recorded)
    poll = Poll(Interval(rig.now - 0.05, rig.now - 0.02), num_records=3)
    value = rig.send(request(["i1"]), UNSAMPLED).value
    for offset, headers in ((1, SAMPLED), (2, UNSAMPLED), (3, SAMPLED)):
        rig.job.accept(Record(PARTITION, offset, b"key", value, headers, 0, poll), rig.now)
    rig.job._spans.bus.refresh()
    rig.job._spans.bus.refresh()

    span = recorded.one(f"poll {PARTITION.topic}")
    assert [f"{link.context.span_id:016x}" for link in span.links] == ["b" * 16] * 2
    assert span.attributes[names.MESSAGES.name] == 3
    assert seconds(span) == pytest.approx(0.03)


def test_copies_to_and_from_the_device_have_spans_if_the_runtime_measures_them(recorded):
    engine = Engine(num_slots=8, max_pairs=8)
    engine.last_copies = lambda: DeviceCopies(to_device_s=0.001, to_host_s=0.002)
    rig = rig_over(recorded, engine=engine)
    rig.send(request(["i1"]), SAMPLED)
    rig.run()

    inside = {span.name: seconds(span) for span in recorded.under(recorded.one("score pairs"))}
    assert inside == pytest.approx({"host to device": 0.001, "device to host": 0.002})


def test_a_sampled_request_leaves_its_trace_beside_the_buckets_it_fell_into(recorded):
    from prometheus_client.openmetrics.exposition import generate_latest

    rig = rig_over(recorded)
    rig.send(request(["i1"], request_id="plain"), UNSAMPLED)
    rig.send(request(["i1"]), SAMPLED)
    run_slowly(rig)

    exposed = generate_latest(rig.metrics.registry).decode()
    for series in ("edje_reply_seconds_bucket", "edje_queue_wait_seconds_bucket", "edje_stage_seconds_bucket"):
        lines = [line for line in exposed.splitlines() if line.startswith(series) and "# {" in line]
        assert lines
        assert all(f'trace_id="{TRACE}"' in line for line in lines)


def test_an_answer_of_the_store_within_one_turn_still_takes_its_time(recorded):
    rig = rig_over(recorded)
    rig.send(request(["i1"]), SAMPLED)
    rig.turn()
    began_at = rig.now
    rig.now += 0.003
    rig.fetches.land()
    rig.now = began_at  # the turn has begun before the answer came
    rig.run()

    timings = rig.reply().timings_ms
    assert timings["fetch"] == pytest.approx(seconds(recorded.one("MGET")) * 1000) == pytest.approx(3)
    assert all(ms >= 0 for ms in timings.values())
    assert sum(ms for stage, ms in timings.items() if stage != "total") == pytest.approx(timings["total"], abs=1e-3)

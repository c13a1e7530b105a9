"""The spans of sending and committing, and the time from an outcome to the broker's acknowledgement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from opentelemetry.trace import StatusCode

from delivery_harness import AtLeastOnceBench, ExactlyOnceBench, record
from tracing_harness import Recorded, links, seconds
from workers.errors import TooLarge, Transient
from workers.ports import Finished, Outgoing
from workers.telemetry import names
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.tracer import child_of, root


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def spans(recorded) -> BusSpans:
    return BusSpans(recorded.tracer(), topic="in", group_id="g")


def finished(offset: int = 0) -> Finished:
    """A record with one reply, both recorded."""
    span = root()
    return Finished(record(offset), (Outgoing("out", b"r-%d" % (offset + 1), b"reply", span=child_of(span)),), span)


def test_a_send_lasts_until_the_broker_has_the_message_and_its_span_is_the_one_that_the_message_names(recorded, spans):
    bench, done = AtLeastOnceBench(spans=spans), finished()
    bench.delivery.begin(done.record)
    bench.delivery.finish(done, 10.0)

    bench.outbox.settle(0)
    bench.turn(now=10.25)

    sent = recorded.one("send out")
    assert sent.context.span_id == done.messages[0].span.span_id
    assert sent.parent.span_id == done.span.span_id
    assert (seconds(sent), sent.attributes[names.CONVERSATION.name]) == (0.25, "r-1")
    assert bench.counts.published == [(0.25, done.span)]


def test_a_send_that_is_tried_again_is_one_span(recorded, spans):
    bench, done = AtLeastOnceBench(spans=spans), finished()
    bench.delivery.begin(done.record)
    bench.delivery.finish(done, 0.0)
    bench.outbox.settle(0, Transient("away"))
    bench.turn(now=1.0)
    bench.turn(now=20.0)
    bench.outbox.settle(1)
    bench.turn(now=21.0)

    assert seconds(recorded.one("send out")) == 21.0


def test_a_refused_message_is_a_failed_send_and_its_replacement_has_another_span(recorded, spans):
    bench, done = AtLeastOnceBench(spans=spans), finished()
    instead = replace(done.messages[0], value=b"short", span=child_of(done.span))
    done = replace(done, messages=(replace(done.messages[0], if_refused=lambda refused: instead),))
    bench.delivery.begin(done.record)
    bench.delivery.finish(done, 0.0)
    bench.outbox.settle(0, TooLarge("no"))
    bench.turn(now=1.0)
    bench.outbox.settle(1)
    bench.turn(now=2.0)

    refused, sent = recorded.named("send out")
    assert (refused.status.status_code, refused.attributes[names.ERROR_TYPE.name]) == (StatusCode.ERROR, "TooLarge")
    assert sent.context.span_id == instead.span.span_id


def test_a_commit_is_linked_to_the_events_it_settles(recorded, spans):
    bench = AtLeastOnceBench(spans=spans)
    both = [finished(0), finished(1)]
    for done in both:
        bench.delivery.begin(done.record)
        bench.delivery.finish(done, 0.0)
    bench.outbox.settle(0)
    bench.outbox.settle(1)
    bench.turn(now=1.0)

    commit = recorded.one("commit in")
    assert links(commit) == {done.span.span_id for done in both}
    assert commit.attributes[names.MESSAGES.name] == 2
    assert commit.parent is None


def test_a_transaction_is_the_commit_and_the_sends_in_it(recorded, spans):
    bench, done = ExactlyOnceBench(spans=spans), finished()
    bench.delivery.begin(done.record)
    bench.delivery.finish(done, 1.0)
    bench.delivery.turn(2.0)
    bench.executor.run()
    bench.delivery.turn(2.5)

    assert seconds(recorded.one("send out")) == seconds(recorded.one("commit in")) == 0.5
    assert links(recorded.one("commit in")) == {done.span.span_id}
    assert bench.counts.published == [(1.5, done.span)]


def test_events_that_are_not_sampled_leave_no_span(recorded, spans):
    bench = AtLeastOnceBench(spans=spans)
    bench.delivery.begin(record(0))
    bench.finish(0, Outgoing("out", b"r-1", b"reply"))
    bench.outbox.settle(0)
    bench.turn(now=1.0)

    assert recorded.spans == []

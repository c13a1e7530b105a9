"""Replies, error replies and dead letters of rerank requests, as clients read them."""

from __future__ import annotations

import json

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from protocols.dead_letters import DeadLetter
from protocols.encoding import CONTENT_TYPE_HEADER, JSON, MSGPACK, encode
from protocols.events import RerankResponse
from rerank_harness import (
    LAYOUT,
    MSGPACK_HEADER,
    NAN_IMAGE,
    PARTITION,
    TOPICS,
    Rig,
    content_of,
    expected,
    header,
    image_request,
    request,
    response_of,
)
from strategies import rerank_requests
from tracing_harness import Recorded
from workers.at_least_once import AtLeastOnce
from workers.bus.memory import MemoryBroker, MemoryInbox, MemoryOutbox
from workers.delivery import UndeliveredLimits
from workers.errors import TooLarge, TopicRefused
from workers.loop import Loop, Wake
from workers.partitions import Partitions
from workers.ports import Outgoing
from workers.telemetry.bus_spans import BusSpans
from workers.telemetry.trace_context import TRACEPARENT, TRACESTATE, trace_id_of

PARENT = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"


def refused(rig: Rig, value, headers=(), topic: str = TOPICS.rerank_responses, key: bytes | None = b"key"):
    """Send what must be refused; the dead letter, and the reply where there is one."""
    record = rig.send(value, headers, key=key)
    rig.turn()
    (message,) = rig.dead_letters()
    letter = DeadLetter.from_message(message.key, message.value, message.headers)
    assert (letter.topic, letter.partition, letter.offset) == (*record.partition, record.offset)
    assert (letter.value, letter.key, letter.headers) == (record.value, record.key, record.headers)
    assert letter.message
    assert rig.metric("edje_dead_letters_total", code=letter.error_code) == 1
    assert rig.is_idle()
    replies = rig.replies(topic)
    assert len(replies) <= 1
    assert len(rig.finished) == 1
    return letter, replies[0] if replies else None


OTHER_TYPE = ((CONTENT_TYPE_HEADER, b"text/xml"),)
FIELDS = request(["i1"])


@pytest.mark.parametrize(
    ("value", "headers", "code", "request_id"),
    [
        (b"", (), "undecodable", "key"),
        (b"\xff\xfe\x00", (), "undecodable", "key"),
        (b'{"request_id": "r1", "query": {"te', (), "undecodable", "r1"),
        (b"[" * 10_000, (), "undecodable", "key"),
        (b"[" * 100_000, (), "event_too_large", "key"),
        (b"[]", (), "invalid_event", "key"),
        (b"null", (), "invalid_event", "key"),
        (b"{}", (), "invalid_event", "key"),
        ({"request_id": "r1"}, (), "invalid_event", "r1"),
        ({"request_id": 7, "query": {"text": "a"}}, (), "invalid_event", "7"),
        ({**FIELDS, "request_id": "line\nbreak"}, (), "invalid_event", "key"),
        ({**FIELDS, "request_id": "x" * 257}, (), "invalid_event", "key"),
        ({**FIELDS, "schema_version": 2}, (), "unsupported_version", "r1"),
        ({**FIELDS, "query": {"text": "a", "image_id": "b"}}, (), "invalid_event", "r1"),
        ({**FIELDS, "candidates": [{"text": "a"}]}, (), "invalid_event", "r1"),
        ({**FIELDS, "top_n": 0}, (), "invalid_event", "r1"),
        ({**FIELDS, "deadline": "tomorrow"}, (), "invalid_event", "r1"),
        ({**FIELDS, "query": {"text": "x" * 101}}, (), "text_too_long", "r1"),
        ({**FIELDS, "query": {"text": "x" * 10_001}}, (), "invalid_event", "r1"),
        (image_request("i1", ["short", "x" * 101]), (), "text_too_long", "r1"),
        ({**FIELDS, "candidates": [{"image_id": "a"}] * 2001}, (), "too_many_candidates", "r1"),
        ({**FIELDS, "model": "m2"}, (), "model_not_served", "r1"),
        ({**FIELDS, "reply_topic": "theirs"}, (), "reply_topic_not_allowed", "r1"),
        ({**FIELDS, "reply_topic": "no spaces"}, (), "invalid_event", "r1"),
        (FIELDS, OTHER_TYPE, "unsupported_content_type", "r1"),
        (FIELDS, ((CONTENT_TYPE_HEADER, b"\xff"),), "unsupported_content_type", "r1"),
        (b"\x81\xaarequest_id\xa2r1", MSGPACK_HEADER, "invalid_event", "r1"),
        (b"\x82\xaarequest_id\xa2r1", MSGPACK_HEADER, "undecodable", "r1"),
        (b"\x82" + b"\xdd\x05\x00\x00\x00" * 300, MSGPACK_HEADER, "undecodable", "key"),
        (b"\xc1", MSGPACK_HEADER, "undecodable", "key"),
        (json.dumps(FIELDS).encode(), MSGPACK_HEADER, "undecodable", "r1"),
        (None, (), "undecodable", "key"),
        (b'{"request_id": "r1", "query": {"text": "dog \\ud83d"}}', (), "undecodable", "r1"),
        (b"\xef\xbb\xbf" + json.dumps(FIELDS).encode(), (), "undecodable", "r1"),
        (json.dumps(FIELDS).encode().replace(b"dog", b"d\xf6g"), (), "undecodable", "r1"),
        (json.dumps({**FIELDS, "unknown": [[]] * 300_000}).encode(), (), "event_too_large", "r1"),
        (FIELDS, (*MSGPACK_HEADER, (CONTENT_TYPE_HEADER, b"text/xml")), "unsupported_content_type", "r1"),
    ],
)
def test_a_message_that_can_never_succeed_is_dead_lettered_and_answered_to_its_id_or_key(
    value, headers, code, request_id
):
    letter, reply = refused(Rig(), value, headers)

    assert letter.error_code == code
    assert (reply.request_id, reply.status, reply.error.code) == (request_id, "error", code)


def test_a_message_without_any_readable_id_is_dead_lettered_and_not_answered():
    letter, reply = refused(Rig(), b"no json", key=b"\xff")

    assert (letter.error_code, reply) == ("undecodable", None)


def test_a_million_candidates_are_refused():
    value = json.dumps({**FIELDS, "candidates": []}).encode()
    value = value.replace(b"[]", b"[" + b'{"image_id":"a"},' * 999_999 + b'{"image_id":"a"}]')

    letter, reply = refused(Rig(max_candidates=100_000), value)

    assert letter.error_code == reply.error.code == "event_too_large"


def test_an_error_goes_to_the_topic_that_the_request_names_where_that_is_allowed():
    _, reply = refused(Rig(), {**FIELDS, "model": "m2", "reply_topic": "mine.a"}, topic="mine.a")

    assert reply.error.code == "model_not_served"


def test_an_error_about_a_broken_request_goes_to_the_address_that_can_be_read():
    value = b'{"request_id": "r1", "reply_topic": "mine.a", "reply_partition": 2, "query": {"text": "\\ud83d"}}'
    rig = Rig()

    _, reply = refused(rig, value, topic="mine.a")

    assert (reply.request_id, reply.error.code) == ("r1", "undecodable")
    assert [message.partition for message in rig.messages("mine.a")] == [2]


def test_every_kind_of_reply_goes_to_the_partition_that_the_request_names():
    rig = Rig()
    rig.put({"i1": 1})
    for fields in ({}, {"deadline": "2001-01-01T00:00:00Z"}, {"model": "m2"}):
        rig.send({**FIELDS, "reply_partition": 5, **fields})
    rig.send(FIELDS)
    rig.run()

    partitions = [message.partition for message in rig.messages(TOPICS.rerank_responses)]
    assert sorted(partitions, key=str) == [5, 5, 5, None]


def test_a_reply_whose_partition_is_refused_becomes_an_error_reply_to_any_partition():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send({**FIELDS, "reply_partition": 5})
    rig.run()

    (message,) = rig.messages(TOPICS.rerank_responses)
    instead = message.instead(TopicRefused("there is no partition 5"))
    assert (instead.topic, instead.partition) == (TOPICS.rerank_responses, None)
    assert response_of(instead).error.code == "reply_topic_refused"


@pytest.mark.parametrize("sent", [request(["gone", "lost"]), image_request("gone", ["a", "b"])])
def test_a_reply_in_which_every_image_is_missing_names_the_model_it_looked_under(sent):
    rig = Rig()
    rig.put({"i1": 1})
    rig.send(sent)
    rig.send(request(["i1", "gone"], request_id="r2"))
    rig.run()

    missing, partial = sorted(rig.replies(), key=lambda reply: reply.request_id)
    (warning,) = missing.warnings
    assert warning.code == "all_images_missing"
    assert LAYOUT.model_digest in warning.message
    assert partial.warnings == []


@pytest.mark.parametrize("topic", [".", ".."])
def test_a_name_that_no_topic_can_have_is_refused_whatever_the_pattern(topic):
    rig = Rig(allowed_reply_topics=("*",))

    letter, reply = refused(rig, {**FIELDS, "reply_topic": topic})

    assert letter.error_code == reply.error.code == "reply_topic_not_allowed"


def test_the_cause_of_a_dead_letter_is_named_by_its_class():
    letter, _ = refused(Rig(), b"{}")

    assert letter.error_class == "EventError"


def test_a_refused_message_does_not_stop_the_next():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send(b"\x00", key=None)
    rig.send(FIELDS)
    rig.run()

    assert rig.reply().status == "ok"


@settings(max_examples=300, deadline=None)
@given(value=st.binary(max_size=60), content_type=st.sampled_from([JSON, MSGPACK, "text/plain"]))
def test_no_bytes_raise(value, content_type):
    rig = Rig()
    rig.send(value, ((CONTENT_TYPE_HEADER, content_type.encode()),))
    rig.run()

    assert len(rig.finished) == 1


@settings(max_examples=100, deadline=None)
@given(event=rerank_requests, content_type=st.sampled_from([JSON, MSGPACK]))
def test_every_valid_request_has_one_outcome(event, content_type):
    rig = Rig()
    record = rig.send(encode(event, content_type), ((CONTENT_TYPE_HEADER, content_type.encode()),))
    rig.run()

    (done,) = rig.finished
    assert (done.record.partition, done.record.offset) == (record.partition, record.offset)
    replies = [message for message in done.messages if not message.topic.endswith(".dlq")]
    assert [response_of(message).request_id for message in replies] == [event.request_id]
    assert rig.is_idle()


def test_a_request_in_msgpack_is_answered_in_msgpack():
    rig = Rig()
    rig.put({"i1": 1})
    sent = request(["i1", "none"])
    rig.send(msgpack.packb(sent), MSGPACK_HEADER)
    rig.run()

    (message,) = rig.messages(TOPICS.rerank_responses)
    assert header(message, CONTENT_TYPE_HEADER) == MSGPACK
    assert msgpack.unpackb(message.value)["status"] == "partial"
    assert content_of(response_of(message)) == expected(sent, {"i1": 1})


def test_a_request_without_a_content_type_is_answered_in_json():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send(FIELDS)
    rig.run()

    (message,) = rig.messages(TOPICS.rerank_responses)
    assert header(message, CONTENT_TYPE_HEADER) == JSON
    assert json.loads(message.value)["results"][0]["id"] == "i1"
    assert message.key == b"r1"


def test_a_reply_names_its_model_and_engine():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send(FIELDS)
    rig.run()

    assert (rig.reply().model, rig.reply().engine) == (LAYOUT.model_digest, "e1")


def test_every_kind_of_reply_continues_the_trace_of_its_request():
    rig = Rig(make_tracer=lambda rig: Recorded().tracer())
    rig.put({"i1": 1, "nan": NAN_IMAGE})
    headers = ((TRACEPARENT, PARENT), (TRACESTATE, b"a=1"))
    late = "2001-01-01T00:00:00Z"
    for sent in (FIELDS, {**FIELDS, "deadline": late}, {**FIELDS, "model": "m2"}, request(["nan"])):
        rig.send(sent, headers)
    rig.run()

    messages = rig.messages(TOPICS.rerank_responses)
    assert sorted(response_of(message).status for message in messages) == ["error", "error", "expired", "ok"]
    assert {trace_id_of(message.headers) for message in messages} == {"a" * 32}
    assert {header(message, TRACESTATE) for message in messages} == {"a=1"}
    assert len({header(message, TRACEPARENT) for message in messages}) == 4


def test_a_reply_too_large_for_the_broker_becomes_an_error_reply_to_the_same_topic():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send({**FIELDS, "reply_topic": "mine.a"}, ((TRACEPARENT, PARENT),))
    rig.run()

    (message,) = rig.messages("mine.a")
    instead = message.instead(TooLarge("no"))
    reply = response_of(instead)
    assert (instead.topic, instead.key, trace_id_of(instead.headers)) == ("mine.a", b"r1", "a" * 32)
    assert (reply.status, reply.error.code) == ("error", "reply_too_large")
    assert "top_n" in reply.error.message


def test_a_reply_whose_topic_is_refused_becomes_an_error_reply_to_the_default_topic():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send({**FIELDS, "reply_topic": "mine.a"}, ((TRACEPARENT, PARENT),))
    rig.run()

    (message,) = rig.messages("mine.a")
    instead = message.instead(TopicRefused("the topic mine.a does not exist"))
    reply = response_of(instead)
    assert (instead.topic, instead.key) == (TOPICS.rerank_responses, b"r1")
    assert (header(instead, CONTENT_TYPE_HEADER), trace_id_of(instead.headers)) == (JSON, "a" * 32)
    assert (reply.request_id, reply.status, reply.error.code) == ("r1", "error", "reply_topic_refused")
    assert reply.error.message == "the topic mine.a does not exist"
    assert instead.instead(TopicRefused("nor does this one")) is None


@pytest.mark.parametrize("refused", [TooLarge("even this"), TopicRefused("gone")])
@pytest.mark.parametrize("fields", [{}, {"model": "m2"}, {"deadline": "2001-01-01T00:00:00Z"}])
def test_a_reply_that_is_refused_repeatedly_ends_in_the_default_topic_and_counts_once(refused, fields):
    rig = Rig()
    rig.put({"i1": 1})
    rig.send({**FIELDS, "reply_topic": "mine.a", **fields})
    rig.run()

    (message,) = rig.messages("mine.a")
    while message.topic == "mine.a":
        message = message.instead(refused)

    assert response_of(message).error.code == "reply_topic_refused"
    assert rig.metric("edje_replies_replaced_total") == 1


def test_a_reply_refused_where_replies_go_by_default_has_no_replacement():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send(FIELDS)
    rig.run()

    (message,) = rig.messages(TOPICS.rerank_responses)
    assert message.instead(TopicRefused("gone")) is None
    assert rig.metric("edje_replies_replaced_total") == 0


def test_a_dead_letter_whose_topic_is_refused_has_no_replacement():
    rig = Rig()
    rig.send(b"x")
    rig.turn()

    (message,) = rig.dead_letters()
    assert message.instead(TopicRefused("gone")) is None


def test_a_dead_letter_too_large_for_the_broker_loses_its_end():
    rig = Rig(max_message_bytes=1000)
    rig.send(b"x" * 5000)
    rig.turn()

    (message,) = rig.dead_letters()
    short = message.instead(TooLarge("no"))
    letter = DeadLetter.from_message(short.key, short.value, short.headers)
    assert letter.truncated
    assert letter.value == b"x" * len(letter.value)
    assert 0 < len(letter.value) < 1000


def test_an_error_message_of_any_length_fits_its_field():
    letter, reply = refused(Rig(), {**FIELDS, "reply_topic": "x" * 249})

    assert len(reply.error.message) <= 2000
    assert letter.error_code == "reply_topic_not_allowed"


def test_from_the_broker_and_back_everything_is_answered_and_committed():
    broker = MemoryBroker(max_message_bytes=1500, refused_topics={"mine.closed"})
    rig = Rig()
    rig.put({f"i{number}": number for number in range(40)})
    wake = Wake()
    inbox = MemoryInbox(broker, topic=PARTITION.topic, group_id="g", wake=wake)
    partitions = Partitions(inbox, wake)
    loop = Loop(
        inbox=inbox,
        job=rig.job,
        delivery=AtLeastOnce(
            inbox,
            MemoryOutbox(broker),
            partitions,
            wake,
            0.0,
            rig.metrics,
            BusSpans.off(),
            UndeliveredLimits(),
        ),
        partitions=partitions,
        dead_letter=lambda record, error: pytest.fail(f"no outcome can be written: {error}"),
        wake=wake,
        clock=lambda: rig.now,
        drain_grace_s=60.0,
        revoke_grace_s=1.0,
    )
    large = request([f"i{number}" for number in range(40)], request_id="large")
    closed = {**FIELDS, "request_id": "closed", "reply_topic": "mine.closed"}
    for sent in (FIELDS, large, closed, {"request_id": "bad"}):
        broker.append(Outgoing(PARTITION.topic, b"k", json.dumps(sent).encode()))

    loop.turn()
    loop.stop()
    while loop.turn():
        rig.now += 0.01
        if rig.fetches.waiting:
            rig.fetches.land()
        if rig.executor.waiting:
            rig.executor.run_next()

    replies = [RerankResponse.model_validate_json(record.value) for record in broker.log(TOPICS.rerank_responses)]
    assert {reply.request_id: reply.error.code if reply.error else reply.status for reply in replies} == {
        "r1": "ok",
        "large": "reply_too_large",
        "closed": "reply_topic_refused",
        "bad": "invalid_event",
    }
    assert len(broker.log(TOPICS.dead_letter(PARTITION.topic))) == 1
    assert broker.committed["g", PARTITION].offset == 4


def test_a_line_of_the_log_about_a_request_names_it_and_its_trace():
    rig = Rig()

    with capture_logs() as lines:
        refused(rig, request(["i1"], schema_version=7, request_id="r-7"), ((TRACEPARENT, PARENT),))

    (line,) = [line for line in lines if line["event"] == "request refused"]
    assert (line["request_id"], line["trace_id"], line["code"]) == ("r-7", "a" * 32, "unsupported_version")

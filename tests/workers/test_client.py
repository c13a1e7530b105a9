"""The client and its reader: answers are matched with what was published, and none is missed or mixed up."""

from __future__ import annotations

import json
from concurrent.futures import Future
from datetime import UTC, datetime

import pytest
from kafka import KafkaProducer
from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

import workers.client
from protocols.dead_letters import DeadLetter
from protocols.encoding import CONTENT_TYPE_HEADER, MSGPACK, encode
from protocols.events import ErrorInfo, ImageIndexed, ImageNew, Query, RerankRequest, RerankResponse, Result
from protocols.topics import Topics
from services import create_topics
from workers.bus.memory import MemoryBroker, MemoryFollower, MemoryOutbox
from workers.bus.producer import KafkaOutbox
from workers.bus.reader import KafkaReader
from workers.client import Client, NoAnswer, Removed, answer_topics, connect
from workers.errors import Transient
from workers.ports import Outgoing
from workers.telemetry.trace_context import trace_id_of

TOPICS = Topics()
DIGESTS = {"model": "m-1", "engine": "e-1"}


class MemoryReader:
    """The reader's twin over the in-memory broker."""

    def __init__(self, broker, topics):
        self.broker = broker
        self.followers = [MemoryFollower(broker, topic) for topic in topics]

    def poll(self, timeout_s):
        return [record for follower in self.followers for record in iter(follower.take, None)]

    def unknown_topics(self):
        return []

    def close(self):
        self.followers.clear()


@pytest.fixture
def broker():
    return MemoryBroker()


@pytest.fixture
def client(broker):
    with Client(MemoryOutbox(broker), MemoryReader(broker, answer_topics(TOPICS)), TOPICS) as client:
        yield client


def request(request_id, text="a dog"):
    return RerankRequest(request_id=request_id, query=Query(text=text), candidates=[{"image_id": "a"}])


def response(request_id, **others):
    return RerankResponse(request_id=request_id, status="ok", **DIGESTS, **others)


def indexed(image_id):
    return ImageIndexed(
        image_id=image_id, model="m-1", num_tokens=16, dtype="int8", num_bytes=1, content_sha256="0" * 64
    )


def answer(broker, topic, event, headers=()):
    broker.append(Outgoing(topic, b"key", encode(event), headers))


def test_replies_are_matched_with_their_requests_in_any_order(broker, client):
    for request_id in ("r-1", "r-2"):
        client.publish_request(request(request_id))
    for request_id in ("r-2", "r-1"):
        answer(broker, TOPICS.rerank_responses, response(request_id))

    assert client.reply_to("r-1", 0).response.request_id == "r-1"
    assert client.reply_to("r-2", 0).response.request_id == "r-2"


def test_a_reply_that_comes_twice_is_seen_once(broker, client):
    client.publish_request(request("r-1"))
    for _ in range(2):
        answer(broker, TOPICS.rerank_responses, response("r-1"))
    client.reply_to("r-1", 0)

    with pytest.raises(NoAnswer):
        client.reply_to("r-1", 0)


def test_replies_to_other_clients_and_broken_replies_are_ignored(broker, client):
    client.publish_request(request("r-1"))
    answer(broker, TOPICS.rerank_responses, response("theirs"))
    broker.append(Outgoing(TOPICS.rerank_responses, None, b"\xff not an event"))
    answer(broker, TOPICS.rerank_responses, response("r-1"))

    assert client.reply_to("r-1", 0).response.request_id == "r-1"


def test_a_reply_that_does_not_come_is_a_sentence_with_the_request_and_the_time(client):
    client.publish_request(request("r-1"))

    with pytest.raises(NoAnswer, match=r"^no reply to request r-1 within 0 s; is the worker running and ready"):
        client.reply_to("r-1", 0)


def test_a_late_reply_is_returned_by_the_next_call(broker, client):
    client.publish_request(request("r-1"))
    with pytest.raises(NoAnswer):
        client.reply_to("r-1", 0)
    answer(broker, TOPICS.rerank_responses, response("r-1"))

    assert client.reply_to("r-1", 0).response.status == "ok"


def test_publishing_to_a_broker_that_is_away_fails(broker, client):
    broker.away = True

    with pytest.raises(Transient):
        client.rerank(request("r-1"), 0)


def test_a_request_is_keyed_by_its_id_and_says_its_encoding(broker, client):
    client.publish_request(request("r-1"))

    (record,) = broker.log(TOPICS.rerank_requests)
    assert record.key == b"r-1"
    assert dict(record.headers)[CONTENT_TYPE_HEADER] == b"application/json"
    assert json.loads(record.value)["query"] == {"text": "a dog"}


def test_image_bytes_travel_as_they_are_and_not_in_base64(broker, client):
    client.publish_image(ImageNew(image_id="a", data=b"\x00" * 1000))

    (record,) = broker.log(TOPICS.images_new)
    assert dict(record.headers)[CONTENT_TYPE_HEADER] == MSGPACK.encode()
    assert len(record.value) < 1100


def test_images_end_indexed_or_as_dead_letters_and_nothing_is_outstanding(broker, client):
    for image_id in ("good", "bad"):
        client.publish_image(ImageNew(image_id=image_id, uri=f"https://images.example/{image_id}"))
    letter = DeadLetter(TOPICS.images_new, 0, 1, b"{}", b"bad", (), "ImageError", "not_an_image", "no image")
    answer(broker, TOPICS.images_indexed, indexed("good"))
    answer(broker, TOPICS.images_indexed, indexed("somebody else's"))
    broker.append(Outgoing(TOPICS.dead_letter(TOPICS.images_new), b"bad", letter.value, letter.to_headers()))

    outcomes = client.image_outcomes(0)

    assert [type(outcome) for outcome in outcomes] == [ImageIndexed, DeadLetter]
    assert client.outstanding_images == frozenset()


def test_a_removal_is_a_null_value_and_ends_with_a_tombstone(broker, client):
    client.publish_removal("a")
    (record,) = broker.log(TOPICS.images_new)
    assert (record.key, record.value) == (b"a", None)
    broker.append(Outgoing(TOPICS.images_indexed, b"another", None))
    broker.append(Outgoing(TOPICS.images_indexed, b"a", None))

    assert client.image_outcomes(0) == [Removed("a")]


def test_requests_that_are_never_answered_are_forgotten_one_day(broker, client, monkeypatch):
    monkeypatch.setattr("workers.client.MAX_OUTSTANDING", 3)
    for number in range(5):
        client.publish_request(request(f"r-{number}"))
    for number in range(5):
        answer(broker, TOPICS.rerank_responses, response(f"r-{number}"))

    assert client.reply_to("r-4", 0).response.request_id == "r-4"
    with pytest.raises(NoAnswer):
        client.reply_to("r-0", 0)
    assert len(client._requests) + len(client._replies) <= 3


def test_a_request_that_timed_out_is_not_kept(broker, client):
    for number in range(100):
        with pytest.raises(NoAnswer):
            client.rerank(request(f"r-{number}"), 0)
    for number in range(100):
        answer(broker, TOPICS.rerank_responses, response(f"r-{number}"))
    client.image_outcomes(0)

    assert not client._requests
    assert not client._replies


def test_without_a_trace_of_the_caller_the_worker_starts_one(broker, client):
    client.publish_request(request("r-1"))

    (record,) = broker.log(TOPICS.rerank_requests)
    assert trace_id_of(record.headers) is None


def test_the_callers_trace_goes_on(broker, client):
    span = NonRecordingSpan(SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(1)))
    token = context.attach(trace.set_span_in_context(span))
    try:
        client.publish_request(request("r-1"))
    finally:
        context.detach(token)

    (record,) = broker.log(TOPICS.rerank_requests)
    assert dict(record.headers)["traceparent"] == b"00-%032x-%016x-01" % (0xABC, 0xDEF)


def test_a_reply_carries_its_trace(broker, client):
    client.publish_request(request("r-1"))
    answer(broker, TOPICS.rerank_responses, response("r-1"), (("traceparent", b"00-%032x-%016x-01" % (5, 6)),))

    assert client.reply_to("r-1", 0).trace_id == f"{5:032x}"


def test_an_error_reply_is_returned_and_not_raised(broker, client):
    client.publish_request(request("r-1"))
    error = RerankResponse(request_id="r-1", status="error", error=ErrorInfo(code="x", message="y"), **DIGESTS)
    answer(broker, TOPICS.rerank_responses, error)

    assert client.reply_to("r-1", 0).response.error.code == "x"


def connection_to(brokers):
    return {"bootstrap_servers": brokers.split(",")}


def read(reader, number):
    """The next records, waiting for them."""
    records = []
    while len(records) < number:
        found = reader.poll(20)
        assert found, f"only {len(records)} of {number} records came"
        records += found
    return [record.value for record in records]


def send(brokers, topic, *values):
    outbox = KafkaOutbox(connection_to(brokers), max_message_bytes=1 << 20)
    sent: list[Future[None]] = [outbox.send(Outgoing(topic, None, value)) for value in values]
    for future in sent:
        future.result(20)
    outbox.close(10)


@pytest.fixture
def reading(kafka_brokers):
    """Make readers that are closed after the test."""
    readers = []

    def start(*topics, **options):
        readers.append(KafkaReader(connection_to(kafka_brokers), topics, **options))
        return readers[-1]

    yield start
    for reader in readers:
        reader.close()


@pytest.mark.services
def test_a_reader_sees_what_comes_after_it_and_nothing_from_before(kafka_brokers, unique_prefix, reading):
    topic = f"{unique_prefix}topic"
    create_topics(kafka_brokers, {topic: 2})
    send(kafka_brokers, topic, b"before")
    reader = reading(topic)
    send(kafka_brokers, topic, b"after")

    assert read(reader, 1) == [b"after"]


@pytest.mark.services
def test_a_topic_that_is_made_later_is_read_from_its_beginning(kafka_brokers, unique_prefix, reading):
    there, later = f"{unique_prefix}there", f"{unique_prefix}later"
    create_topics(kafka_brokers, {there: 1})
    reader = reading(there, later)
    assert reader.poll(0) == []
    assert reader.unknown_topics() == [later]
    create_topics(kafka_brokers, {later: 2})
    send(kafka_brokers, later, b"first")

    assert read(reader, 1) == [b"first"]
    assert reader.unknown_topics() == []


@pytest.mark.services
def test_a_reader_of_a_missing_topic_waits_no_longer_than_its_timeout(reading, unique_prefix):
    reader = reading(f"{unique_prefix}nothing")

    assert reader.poll(0.2) == []
    assert reader.unknown_topics() == [f"{unique_prefix}nothing"]


@pytest.mark.services
def test_reading_from_a_time_starts_at_the_first_record_that_is_not_older(kafka_brokers, unique_prefix, reading):
    topic = f"{unique_prefix}topic"
    create_topics(kafka_brokers, {topic: 1})
    with KafkaProducer(bootstrap_servers=kafka_brokers) as producer:
        for seconds in (10, 20, 30):
            producer.send(topic, b"%d" % seconds, timestamp_ms=seconds * 1000).get(timeout=20)

    assert read(reading(topic, start=datetime.fromtimestamp(15, UTC)), 2) == [b"20", b"30"]


@pytest.mark.services
def test_a_reader_catches_up_across_transaction_markers(kafka_brokers, unique_prefix, reading):
    topic = f"{unique_prefix}topic"
    create_topics(kafka_brokers, {topic: 1})
    with KafkaProducer(bootstrap_servers=kafka_brokers, transactional_id=unique_prefix) as producer:
        producer.init_transactions()
        for value, finish in ((b"kept", producer.commit_transaction), (b"undone", producer.abort_transaction)):
            producer.begin_transaction()
            producer.send(topic, value).get(timeout=20)
            finish()
    reader = reading(topic, start="beginning")

    values = []
    for _ in range(100):
        values += [record.value for record in reader.poll(0.2)]
        if reader.caught_up():
            break
    assert reader.caught_up()
    assert values == [b"kept"]


@pytest.mark.services
def test_a_request_goes_to_kafka_and_its_reply_comes_back(kafka_brokers, unique_prefix):
    topics = Topics(unique_prefix)
    names = [topics.rerank_requests, *answer_topics(topics)]
    create_topics(kafka_brokers, dict.fromkeys(names, 1))
    with connect(connection_to(kafka_brokers), topics) as client:
        client.publish_request(request("r-1")).result(20)
        send(kafka_brokers, topics.rerank_responses, encode(response("r-1")))

        assert client.reply_to("r-1", 20).response == response("r-1")


@pytest.mark.services
def test_the_example_of_the_module_prints_the_ranking(kafka_brokers, unique_prefix, monkeypatch, capsys):
    topics = Topics(unique_prefix)
    create_topics(kafka_brokers, dict.fromkeys([topics.rerank_requests, *answer_topics(topics)], 1))
    results = [Result(index=1, id="img-2", relevance_score=0.93, logit=2.6)]
    publish = Client.publish_request

    def publish_and_answer(client, request):
        sent = publish(client, request)
        reply = RerankResponse(request_id=request.request_id, status="ok", results=results, **DIGESTS)
        send(kafka_brokers, topics.rerank_responses, encode(reply))
        return sent

    monkeypatch.setattr(Client, "publish_request", publish_and_answer)
    lines = [line[4:] for line in workers.client.__doc__.splitlines() if line.startswith("    ")]
    example = "\n".join(lines).replace('connect("localhost:9092")', "connect(brokers, topics)")

    exec(example, {"brokers": kafka_brokers, "topics": topics})

    assert capsys.readouterr().out == "img-2 0.93\n"

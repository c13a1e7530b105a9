"""Requests that can never succeed, and requests that the model does not understand, sent to one rerank worker."""

from __future__ import annotations

import json

import msgpack
import pytest
from kafka import KafkaProducer

from service_harness import Service, letter_in, reply_in

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services

QUERY = {"text": "a dog"}


def request(request_id: str, **fields: object) -> bytes:
    event = {"schema_version": 1, "request_id": request_id, "query": QUERY, "candidates": [{"image_id": "dog"}]}
    return json.dumps(event | fields).encode()


def broken(request_id: str, valid: bytes, invalid: bytes) -> bytes:
    """Return a request with some of its bytes replaced."""
    value = request(request_id)
    assert valid in value
    return value.replace(valid, invalid)


MSGPACK = b"application/msgpack"
#: Key, value, content type and expected error code. If the value has an id, it equals the key.
BAD_REQUESTS = [
    ("not-json", b"\x80\x81 no json at all", None, "undecodable"),
    ("nothing", b"", None, "undecodable"),
    ("tombstone", None, None, "undecodable"),
    ("cut-off", request("cut-off")[:60], None, "undecodable"),
    ("a-list", b"[1, 2, 3]", None, "invalid_event"),
    ("future", request("future", schema_version=2), None, "unsupported_version"),
    ("no-query", json.dumps({"request_id": "no-query", "candidates": []}).encode(), None, "invalid_event"),
    ("no-id", json.dumps({"query": QUERY, "candidates": []}).encode(), None, "invalid_event"),
    ("7", request("7").replace(b'"7"', b"7"), None, "invalid_event"),
    ("null-id", broken("null-id", b'"null-id"', b"null"), None, "invalid_event"),
    ("half-an-emoji", broken("half-an-emoji", b"a dog", b"dog \\ud83d"), None, "undecodable"),
    ("bom", b"\xef\xbb\xbf" + request("bom"), None, "undecodable"),
    ("utf-16", request("utf-16").decode().encode("utf-16"), None, "undecodable"),
    ("latin-1", broken("latin-1", b"a dog", b"d\xf6g"), None, "undecodable"),
    ("line-break", broken("line-break", b"a dog", b"a\ndog"), None, "undecodable"),
    ("trailing", request("trailing") + b" and more", None, "undecodable"),
    ("comma", request("comma")[:-1] + b",}", None, "undecodable"),
    ("single-quotes", request("single-quotes").replace(b'"', b"'"), None, "undecodable"),
    ("deep", request("deep")[:-1] + b', "x": ' + b"[" * 3_000 + b"]" * 3_000 + b"}", None, "undecodable"),
    ("lists", request("lists", x=[[]] * 100_000), None, "event_too_large"),
    ("long-text", request("long-text", query={"text": "dog " * 501}), None, "text_too_long"),
    ("longest-text", request("longest-text", query={"text": "x" * 10_001}), None, "invalid_event"),
    ("too-many", request("too-many", candidates=[{"image_id": "i"}] * 1_001), None, "too_many_candidates"),
    ("nan", request("nan", candidates=[{"image_id": "i", "score": float("nan")}]), None, "invalid_event"),
    ("huge-number", broken("huge-number", b'"image_id"', b'"score": 1e999, "image_id"'), None, "invalid_event"),
    ("text-score", request("text-score", candidates=[{"image_id": "i", "score": "0.5"}]), None, "invalid_event"),
    ("as-xml", request("as-xml"), b"application/xml", "unsupported_content_type"),
    ("json-as-msgpack", request("json-as-msgpack"), MSGPACK, "undecodable"),
    ("msgpack-as-json", msgpack.packb({"request_id": "msgpack-as-json", "query": QUERY}), None, "undecodable"),
    ("no-msgpack", b"\xc1\xff\x00", MSGPACK, "undecodable"),
    (
        "msgpack-future",
        msgpack.packb({"request_id": "msgpack-future", "schema_version": 9}),
        MSGPACK,
        "unsupported_version",
    ),
    ("raw-bytes", msgpack.packb({"request_id": b"raw-bytes", "query": {"text": b"a dog"}}), MSGPACK, "invalid_event"),
    ("msgpack-lists", msgpack.packb({"request_id": "msgpack-lists", "x": [[]] * 100_000}), MSGPACK, "event_too_large"),
    ("msgpack-cut", msgpack.packb({"request_id": "msgpack-cut", "query": QUERY})[:-3], MSGPACK, "undecodable"),
    ("no-words", request("no-words", query={"text": " ?! "}), None, "query_empty"),
    ("other-model", request("other-model", model="0" * 16), None, "model_not_served"),
    ("secret-topic", request("secret-topic", reply_topic="payments"), None, "reply_topic_not_allowed"),
]


def test_each_bad_request_is_dead_lettered_with_its_cause_and_answered_with_an_error(service: Service):
    service.store_images(["dog"])
    worker = service.rerank()

    for key, value, content_type, _ in BAD_REQUESTS:
        headers = (("content-type", content_type),) if content_type else ()
        service.publish(service.topics.rerank_requests, value, key, (*headers, ("origin", b"test")))
    service.publish(service.topics.rerank_requests, b"no id in value or key")
    service.ask("good", ["dog"])
    service.flush()
    letters = service.dead_letters(service.topics.rerank_requests).wait_ids([bad[0] for bad in BAD_REQUESTS])
    replies = service.replies().wait_ids([*(bad[0] for bad in BAD_REQUESTS), "good"])

    for key, value, content_type, code in BAD_REQUESTS:
        (record,) = letters[key]
        letter = letter_in(record)
        assert (letter.value, letter.topic, letter.truncated) == (value, service.topics.rerank_requests, False), key
        assert letter.error_code == code, (key, letter.message)
        assert letter.message, key
        assert letter.error_class, key
        assert ("origin", b"test") in letter.headers, key
        (record,) = replies[key]
        reply = (msgpack.unpackb if content_type == MSGPACK else json.loads)(record.value)
        assert (reply["request_id"], reply["status"], reply["error"]["code"]) == (key, "error", code)
        assert reply["results"] == []
    assert reply_in(replies["good"][0])["status"] == "ok"
    assert len(replies) == len(BAD_REQUESTS) + 1
    assert worker.metric("edje_events_total", outcome="dead_letter") == len(BAD_REQUESTS) + 1
    assert worker.metric("edje_dead_letters_total", code="internal_error") == 0
    assert worker.get("/livez")[0] == 200
    assert worker.stop() == 0


@pytest.mark.parametrize("padding", ["[]," * 6_000_000 + "[]", "0," * 9_000_000 + "0"], ids=["lists", "numbers"])
def test_a_request_of_many_megabytes_that_is_small_while_compressed_costs_little(service: Service, padding: str):
    service.store_images(["dog"])
    worker = service.rerank()
    before = worker.metric("process_resident_memory_bytes")
    producer = KafkaProducer(
        bootstrap_servers=service.brokers.split(","), compression_type="gzip", max_request_size=64 << 20
    )

    producer.send(service.topics.rerank_requests, request("bomb")[:-1] + f', "x": [{padding}]}}'.encode(), b"bomb")
    producer.flush()
    producer.close()
    service.ask("good", ["dog"])
    service.flush()
    replies = service.replies().wait_ids(["bomb", "good"])

    assert reply_in(replies["bomb"][0])["error"]["code"] == "event_too_large"
    assert reply_in(replies["good"][0])["status"] == "ok"
    assert worker.metric("process_resident_memory_bytes") - before < 200e6
    assert worker.stop() == 0


def test_the_answer_to_a_broken_request_goes_to_the_address_that_it_names(service: Service):
    service.store_images(["dog"])
    worker = service.rerank()
    value = json.dumps({"reply_topic": service.topics.rerank_responses, "reply_partition": 1, "request_id": "r"})

    for number in range(3):
        service.publish(service.topics.rerank_requests, value.encode()[:-1] + b', "query": "\\ud83d"}', f"{number}")
    service.ask("good", ["dog"], reply_partition=1)
    service.flush()
    replies = service.replies().wait_for(4)

    assert [record.partition.number for record in replies] == [1] * 4
    assert worker.stop() == 0


def test_a_query_that_is_not_understood_is_answered_with_a_warning(service: Service):
    service.store_images(["dog"])
    worker = service.rerank()

    service.ask("emoji", ["dog"], query={"text": "\N{DOG FACE}\N{CAT FACE}"})
    service.ask("known", ["dog"])
    service.ask("gone", ["lost", "gone"])
    service.flush()
    replies = service.replies().wait_ids(["emoji", "known", "gone"])

    codes = {name: [each["code"] for each in reply_in(records[0])["warnings"]] for name, records in replies.items()}
    assert codes == {"emoji": ["query_not_understood"], "known": [], "gone": ["all_images_missing"]}
    assert service.checkpoint.layout.model_digest in reply_in(replies["gone"][0])["warnings"][0]["message"]
    assert worker.metric("edje_reply_warnings_total", code="query_not_understood") == 1


def test_a_request_with_a_million_candidates_is_refused_and_the_next_one_is_answered(
    make_service, kafka_brokers, redis_url
):
    limit = 32 << 20
    service = make_service(kafka_brokers, redis_url, max_message_bytes=limit)
    service.store_images(["dog"])
    worker = service.rerank(max_message_bytes=limit, max_request_bytes=limit)

    many = ",".join(['{"image_id":"img"}'] * 1_000_000)
    million = f'{{"request_id": "million", "query": {{"text": "a dog"}}, "candidates": [{many}]}}'.encode()
    service.publish(service.topics.rerank_requests, million, "million")
    service.ask("good", ["dog"])
    service.flush()
    replies = service.replies().wait_ids(["million", "good"])

    assert reply_in(replies["million"][0])["error"]["code"] == "event_too_large"
    assert reply_in(replies["good"][0])["status"] == "ok"
    assert worker.metric("edje_dead_letters_total", code="event_too_large") == 1
    assert worker.metric("process_resident_memory_bytes") < 600e6

"""Requests that can never succeed, sent to one rerank worker that has to survive them all."""

from __future__ import annotations

import json

import msgpack
import pytest

from service_harness import Service, letter_in, reply_in

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services

QUERY = {"text": "a dog"}


def request(request_id: str, **fields: object) -> bytes:
    event = {"schema_version": 1, "request_id": request_id, "query": QUERY, "candidates": [{"image_id": "dog"}]}
    return json.dumps(event | fields).encode()


#: The key of each, what is sent, its content type, the code it gets, and whether its id can be read.
BAD_REQUESTS = [
    ("not-json", b"\x80\x81 no json at all", None, "undecodable", False),
    ("nothing", b"", None, "undecodable", False),
    ("cut-off", request("cut-off")[:60], None, "undecodable", True),
    ("a-list", b"[1, 2, 3]", None, "invalid_event", False),
    ("future", request("future", schema_version=2), None, "unsupported_version", True),
    ("no-query", json.dumps({"request_id": "no-query", "candidates": []}).encode(), None, "invalid_event", True),
    ("no-id", json.dumps({"query": QUERY, "candidates": []}).encode(), None, "invalid_event", False),
    ("long-text", request("long-text", query={"text": "dog " * 501}), None, "text_too_long", True),
    ("longest-text", request("longest-text", query={"text": "x" * 10_001}), None, "invalid_event", True),
    ("too-many", request("too-many", candidates=[{"image_id": "i"}] * 1_001), None, "too_many_candidates", True),
    (
        "not-finite",
        request("not-finite", candidates=[{"image_id": "i", "score": float("nan")}]),
        None,
        "invalid_event",
        True,
    ),
    ("as-xml", request("as-xml"), b"application/xml", "unsupported_content_type", True),
    ("no-msgpack", b"\xc1\xff\x00", b"application/msgpack", "undecodable", False),
    (
        "msgpack-future",
        msgpack.packb({"request_id": "msgpack-future", "schema_version": 9}),
        b"application/msgpack",
        "unsupported_version",
        True,
    ),
    ("other-model", request("other-model", model="0" * 16), None, "model_not_served", True),
    ("secret-topic", request("secret-topic", reply_topic="payments"), None, "reply_topic_not_allowed", True),
]


def test_each_bad_request_is_dead_lettered_with_its_cause_and_answered_where_its_id_can_be_read(service: Service):
    service.store_images(["dog"])
    worker = service.rerank()

    for key, value, content_type, _, _ in BAD_REQUESTS:
        headers = (("content-type", content_type),) if content_type else ()
        service.publish(service.topics.rerank_requests, value, key, (*headers, ("origin", b"test")))
    service.ask("good", ["dog"])
    service.flush()
    letters = service.dead_letters(service.topics.rerank_requests).wait_ids([bad[0] for bad in BAD_REQUESTS])
    readable = [bad[0] for bad in BAD_REQUESTS if bad[4]]
    replies = service.replies().wait_ids([*readable, "good"])

    for key, value, _, code, is_readable in BAD_REQUESTS:
        (record,) = letters[key]
        letter = letter_in(record)
        assert (letter.value, letter.topic, letter.truncated) == (value, service.topics.rerank_requests, False), key
        assert letter.error_code == code, (key, letter.message)
        assert letter.message, key
        assert letter.error_class, key
        assert ("origin", b"test") in letter.headers, key
        if is_readable:
            (record,) = replies[key]
            codec = msgpack.unpackb if key.startswith("msgpack") else json.loads
            reply = codec(record.value)
            assert (reply["status"], reply["error"]["code"], reply["results"]) == ("error", code, []), key
        else:
            assert key not in replies
    assert reply_in(replies["good"][0])["status"] == "ok"
    assert set(replies) == {*readable, "good"}
    assert worker.metric("edje_events_total", outcome="dead_letter") == len(BAD_REQUESTS)
    assert worker.get("/livez")[0] == 200
    assert worker.stop() == 0


def test_a_request_with_a_million_candidates_is_refused_and_the_next_one_is_answered(
    make_service, kafka_brokers, redis_url
):
    limit = 32 << 20
    service = make_service(kafka_brokers, redis_url, max_message_bytes=limit)
    service.store_images(["dog"])
    worker = service.rerank(max_message_bytes=limit)

    many = ",".join(['{"image_id":"img"}'] * 1_000_000)
    million = f'{{"request_id": "million", "query": {{"text": "a dog"}}, "candidates": [{many}]}}'.encode()
    service.publish(service.topics.rerank_requests, million, "million")
    service.ask("good", ["dog"])
    service.flush()
    replies = service.replies().wait_ids(["million", "good"])

    assert reply_in(replies["million"][0])["error"]["code"] == "invalid_event"
    assert reply_in(replies["good"][0])["status"] == "ok"
    assert worker.metric("edje_dead_letters_total", code="invalid_event") == 1
    assert worker.metric("process_resident_memory_bytes") < 600e6

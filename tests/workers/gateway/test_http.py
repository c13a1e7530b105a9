"""The gateway's HTTP APIs over the in-memory bus: answers, limits, degradation, bad input and callers that leave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import aiohttp
import pytest

from gateway_harness import LIMIT_S, PARTITION, TOPICS, GatewayBench
from protocols.dead_letters import DeadLetter
from protocols.encoding import MSGPACK, decode
from protocols.events import ImageNew
from protocols.source_position import SourcePosition
from protocols.thumbnail import encode_thumbnail, thumbnail_key
from workers.gateway.api_keys import new_key
from workers.gateway.openapi import PATH, openapi_document
from workers.ports import Outgoing


@pytest.fixture
def make() -> Iterator[Callable[..., GatewayBench]]:
    benches: list[GatewayBench] = []

    def build(**options: object) -> GatewayBench:
        benches.append(GatewayBench(options=options))
        return benches[-1]

    yield build
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make) -> GatewayBench:
    return make()


# --- reranking ---


@pytest.mark.parametrize("path", ["/v2/rerank", "/v1/rerank", "/rerank", "/openai/v1/rerank"])
def test_documents_come_back_ranked_on_every_path(bench, path):
    answer = bench.rerank(["a", "b", "c"], path=path)

    assert answer.status == 200
    assert [result["index"] for result in answer.json["results"]] == [2, 1, 0]
    assert answer.headers["content-type"] == "application/json"


def test_a_request_names_its_reply_partition_and_a_deadline_before_the_callers(bench):
    before = time.time()
    bench.rerank(["a"], timeout_ms=2_000)

    [request] = bench.worker.requests
    assert (request.reply_topic, request.reply_partition) == (TOPICS.gateway_replies, PARTITION)
    assert 1.5 < request.deadline.timestamp() - before < 2.0


def test_no_reply_in_time_is_the_given_order_and_says_so(bench):
    bench.worker.rule = bench.worker.never

    answer = bench.rerank(["a", "b"], timeout_ms=100)

    assert answer.status == 200
    assert answer.headers["edje-degraded"] == answer.json["degraded"] == "timeout"
    assert [result["index"] for result in answer.json["results"]] == [0, 1]
    assert bench.value_of("edje_gateway_degraded_total", code="timeout") == 1


@pytest.mark.parametrize(
    ("setting", "field", "status"),
    [("first_stage", None, 200), ("error", None, 504), ("first_stage", "error", 504), ("error", "first_stage", 200)],
)
def test_a_failure_is_an_error_where_the_setting_or_the_request_says_so(make, setting, field, status):
    bench = make(on_failure=setting)
    bench.worker.rule = bench.worker.never

    fields = {} if field is None else {"on_failure": field}
    answer = bench.rerank(["a"], timeout_ms=100, **fields)

    assert answer.status == status
    assert "edje-degraded" in answer.headers or answer.json["code"] == "timeout"


def test_a_reply_after_the_caller_has_its_answer_is_late_and_counted(bench):
    bench.worker.rule = bench.worker.never
    bench.rerank(["a"], timeout_ms=50)

    bench.worker.reply(bench.worker.requests[0], bench.worker.in_reverse(bench.worker.requests[0]))

    bench.eventually(lambda: bench.value_of("edje_gateway_replies_total", kind="late") == 1)


def test_replies_that_are_unknown_or_unreadable_are_counted_and_change_no_other_answer(bench):
    def rule(request):
        bench.worker.reply(request, b"not a reply")
        other = request.model_copy(update={"request_id": "of another life"})
        bench.worker.reply(other, bench.worker.in_reverse(other))
        return bench.worker.in_reverse(request)

    bench.worker.rule = rule

    assert bench.rerank(["a", "b"]).json["results"][0]["index"] == 1
    assert bench.value_of("edje_gateway_replies_total", kind="invalid") == 1
    assert bench.value_of("edje_gateway_replies_total", kind="unknown") == 1


@pytest.mark.parametrize(
    ("code", "status"),
    [("text_too_long", 422), ("too_many_candidates", 422), ("internal_error", 200), ("reply_too_large", 200)],
)
def test_an_error_reply_is_the_callers_fault_or_degrades_the_answer(bench, code, status):
    bench.worker.rule = bench.worker.error(code)

    answer = bench.rerank(["a"])

    assert answer.status == status
    assert code in (answer.json.get("code"), answer.json.get("degraded"))


def test_an_expired_request_degrades_the_answer(bench):
    bench.worker.rule = bench.worker.expired

    assert bench.rerank(["a"]).json["degraded"] == "expired"


def test_a_reply_that_does_not_fit_degrades_the_answer(bench):
    bench.worker.rule = lambda request: bench.worker.in_reverse(
        request.model_copy(update={"candidates": [*request.candidates, {"image_id": "x"}]})
    )

    assert bench.rerank(["a"]).json["degraded"] == "invalid_reply"


def test_kafka_away_degrades_the_answer_at_once(bench):
    bench.broker.away = True

    started = time.monotonic()
    answer = bench.rerank(["a"])

    assert answer.json["degraded"] == "kafka_away"
    assert time.monotonic() - started < 2


def test_a_gateway_that_is_not_connected_yet_answers_in_the_given_order(make):
    assert make(connected=False).rerank(["a"]).json["degraded"] == "kafka_away"


def test_a_request_that_kafka_finds_too_large_is_the_callers(bench):
    bench.broker.max_message_bytes = 500

    assert bench.rerank(["a" * 200, "b" * 200, "c" * 200]).status == 413


def test_without_documents_nothing_is_asked(bench):
    answer = bench.rerank([])

    assert (answer.status, answer.json["results"]) == (200, [])
    assert bench.worker.requests == []


def test_addresses_are_looked_up_in_the_index(bench):
    bench.add_images("img-1", uri="https://x/1.jpg")

    answer = bench.rerank([{"image": "https://x/1.jpg"}, {"image": "https://x/2.jpg"}])

    assert bench.worker.requests[0].image_ids() == ["img-1"]
    assert answer.json["missing"] == [{"image": "https://x/2.jpg"}]


def test_texts_are_ranked_for_an_image(bench):
    bench.rerank(["a dog", "a cat"], query={"image_id": "img-1"})

    assert bench.worker.requests[0].query.image_id == "img-1"
    assert bench.worker.requests[0].texts() == ["a dog", "a cat"]


def test_two_callers_with_one_idempotency_key_share_one_request(bench):
    bench.worker.rule = bench.worker.never
    answers = []

    def call() -> None:
        answers.append(bench.post("/v2/rerank", {"query": "a", "documents": ["a", "b"]}, Idempotency_Key="k-1"))

    callers = [threading.Thread(target=call) for _ in range(2)]
    callers[0].start()
    bench.eventually(lambda: bench.worker.requests)
    callers[1].start()
    bench.eventually(lambda: bench.requests._pending._open["anyone:k-1"].num_callers == 2)
    bench.worker.reply(bench.worker.requests[0], bench.worker.in_reverse(bench.worker.requests[0]))
    for caller in callers:
        caller.join(LIMIT_S)

    assert len(bench.worker.requests) == 1
    assert [answer.json["results"][0]["index"] for answer in answers] == [1, 1]
    assert {answer.headers["edje-request-id"] for answer in answers} == {"anyone:k-1"}


def test_an_idempotency_key_of_another_request_is_refused(bench):
    bench.post("/v2/rerank", {"query": "a", "documents": ["a"]}, Idempotency_Key="k-1")

    answer = bench.post("/v2/rerank", {"query": "b", "documents": ["a"]}, Idempotency_Key="k-1")

    assert (answer.status, answer.json["code"]) == (422, "idempotency_key_reused")
    assert bench.post("/v2/rerank", {}, Idempotency_Key="ä" * 3).status == 422


# --- search ---


def test_a_search_answers_with_both_orders(bench):
    bench.add_images("a", "b", "c", "d", place="sea")

    answer = bench.post("/v1/search", {"query": "a dog", "top_n": 2, "candidates": 3})

    body = answer.json
    assert answer.status == 200
    assert [result["image_id"] for result in body["results"]] == ["c", "b"]
    assert [(r["image_id"], r["rank"], r["rank_before"]) for r in body["first_stage"]] == [("a", 3, 1), ("b", 2, 2)]
    assert body["results"][0]["metadata"] == {"place": "sea"}
    assert bench.worker.requests[0].candidates[0] == {"image_id": "a", "score": pytest.approx(1.0)}
    assert set(body["timings_ms"]) == {"embed", "search_index", "score"}
    assert body["num_candidates"] == 3


def test_a_degraded_search_is_in_the_order_of_the_index_without_scores(bench):
    bench.add_images("a", "b")
    bench.worker.rule = bench.worker.never

    answer = bench.post("/v1/search", {"query": "a dog", "timeout_ms": 50})

    assert answer.headers["edje-degraded"] == "timeout"
    assert [(r["image_id"], r["relevance_score"]) for r in answer.json["results"]] == [("a", None), ("b", None)]
    assert "rerank workers" in answer.json["degraded_message"]


def test_a_search_names_images_without_tokens(bench):
    bench.add_images("a", "b")
    bench.worker.missing = {"b"}

    results = bench.post("/v1/search", {"query": "a dog"}).json["results"]

    assert [(r["image_id"], r["is_missing"]) for r in results] == [("a", False), ("b", True)]


def test_a_search_keeps_to_its_filter(bench):
    bench.add_images("a", place="sea")
    bench.add_images("b", place="lake")

    def found(**conditions: object) -> list[str]:
        body = {"query": "a dog", "filter": conditions}
        return sorted(result["image_id"] for result in bench.post("/v1/search", body).json["results"])

    assert found(place="sea") == ["a"]
    assert found(place=["sea", "lake"]) == ["a", "b"]
    assert found(place="sea", year="2024") == []


def test_a_search_of_an_empty_index_finds_nothing(bench):
    answer = bench.post("/v1/search", {"query": "a dog"})

    assert (answer.status, answer.json["results"]) == (200, [])


def test_a_search_without_its_index_is_unavailable_and_reranking_goes_on(bench):
    bench.index.away = True

    answer = bench.post("/v1/search", {"query": "a dog"})

    assert (answer.status, answer.json["code"]) == (503, "index_away")
    assert answer.headers["retry-after"] == "1"
    assert bench.rerank(["a"]).status == 200


def test_a_gateway_without_search_says_so(make):
    assert make(search=False).post("/v1/search", {"query": "a dog"}).json["code"] == "no_search"


# --- images ---


def png(shade: int = 7) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + bytes([shade]) * 100


def multipart(files: dict[str, bytes], **fields: str) -> tuple[bytes, str]:
    parts = [
        b'--B\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), value.encode())
        for name, value in fields.items()
    ]
    parts += [
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n' % (name.encode(), data)
        for name, data in files.items()
    ]
    return b"".join(parts) + b"--B--\r\n", "multipart/form-data; boundary=B"


def published(bench) -> list[ImageNew | None]:
    return [
        None if record.value is None else decode(ImageNew, record.value, dict(record.headers)["content-type"].decode())
        for record in bench.broker.log(TOPICS.images_new)
    ]


def test_an_uploaded_file_is_published_under_the_digest_of_its_bytes(bench):
    body, content_type = multipart({"dog.png": png()})

    answer = bench.call("POST", "/v1/images", body, {"Content-Type": content_type})

    [image] = published(bench)
    assert answer.status == 202
    assert answer.json["images"] == [{"image_id": image.image_id, "status": "pending"}]
    assert image.image_id == hashlib.sha256(png()).hexdigest()[:32]
    assert (image.data, image.metadata) == (png(), {"name": "dog.png"})


def test_several_files_and_fields_are_published_together(bench):
    body, content_type = multipart({"1.png": png(1), "2.png": png(2)}, metadata='{"place": "sea"}')

    bench.call("POST", "/v1/images", body, {"Content-Type": content_type})

    assert [image.metadata for image in published(bench)] == [
        {"name": "1.png", "place": "sea"},
        {"name": "2.png", "place": "sea"},
    ]


def test_an_address_and_bytes_in_base64_are_published(bench):
    bench.post("/v1/images", {"image_id": "one", "uri": "https://x/1.jpg"})
    bench.post("/v1/images", {"image_id": "two", "data": base64.b64encode(png()).decode()})

    by_id = {image.image_id: image for image in published(bench)}
    assert (by_id["one"].uri, by_id["one"].metadata) == ("https://x/1.jpg", {"uri": "https://x/1.jpg"})
    assert by_id["two"].data == png()


def test_an_image_is_pending_then_indexed(bench):
    bench.post("/v1/images", {"image_id": "one/1", "uri": "https://x/1.jpg"})
    assert bench.call("GET", "/v1/images/one/1").json["status"] == "pending"

    bench.add_images("one/1", place="sea")

    assert bench.call("GET", "/v1/images/one%2F1").json == {
        "image_id": "one/1",
        "status": "indexed",
        "metadata": {"place": "sea"},
    }


def test_an_image_that_cannot_be_encoded_has_failed_with_its_cause(bench):
    bench.post("/v1/images", {"image_id": "one", "uri": "https://x/1.jpg"})
    letter = DeadLetter("images.new", 0, 0, b"{}", b"one", (), "ImageError", "image_broken", "not an image", 1)
    topic = TOPICS.dead_letter(TOPICS.images_new)

    bench.loop.call_soon_threadsafe(
        lambda: bench.broker.append(Outgoing(topic, letter.key, letter.value, letter.to_headers()))
    )

    bench.eventually(lambda: bench.call("GET", "/v1/images/one").json["status"] == "failed")
    assert bench.call("GET", "/v1/images/one").json["error"] == "image_broken"


def test_an_unknown_image_is_not_found(bench):
    assert bench.call("GET", "/v1/images/unknown").json["code"] == "image_not_found"


def test_a_removal_is_a_tombstone(bench):
    assert bench.call("DELETE", "/v1/images/one").status == 202

    [record] = bench.broker.log(TOPICS.images_new)
    assert (record.key, record.value) == (b"one", None)


def test_a_thumbnail_comes_from_the_store(bench):
    jpeg = b"\xff\xd8\xff" + b"x" * 100
    bench.store.put_many({thumbnail_key("one"): encode_thumbnail(jpeg, SourcePosition(1, 1))})

    answer = bench.call("GET", "/v1/images/one/thumbnail")

    assert (answer.status, answer.data, answer.headers["content-type"]) == (200, jpeg, "image/jpeg")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert bench.call("GET", "/v1/images/two/thumbnail").json["code"] == "thumbnail_not_found"


def test_what_is_no_picture_is_not_served(bench):
    html = b"<script>alert(1)</script>"
    bench.store.put_many({thumbnail_key("one"): encode_thumbnail(html, SourcePosition(1, 1))})

    assert bench.call("GET", "/v1/images/one/thumbnail").status == 404


def test_a_store_that_is_away_is_unavailable(bench):
    bench.store.away = True

    assert bench.call("GET", "/v1/images/one/thumbnail").json["code"] == "store_away"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{}", "application/json", 422, "invalid_request"),
        (b'{"uri": "x", "data": "eA=="}', "application/json", 422, "invalid_request"),
        (b'{"data": "not base64!"}', "application/json", 422, "invalid_request"),
        (b'{"uri": "https://x/1.jpg", "image_id": "a\\nb"}', "application/json", 422, "invalid_request"),
        (b"--B--\r\n", "multipart/form-data; boundary=B", 422, "no_file"),
        (b"nonsense", "multipart/form-data; boundary=B", 400, "not_multipart"),
        (b"nonsense", "multipart/form-data", 400, "not_multipart"),
        (multipart({"a.png": b""})[0], "multipart/form-data; boundary=B", 422, "empty_file"),
        (multipart({"a": b"1", "b": b"2"}, image_id="x")[0], "multipart/form-data; boundary=B", 422, "invalid_request"),
        (multipart({"a": b"1"}, metadata="[]")[0], "multipart/form-data; boundary=B", 422, "invalid_request"),
        (multipart({"a": b"1" * 300_000})[0], "multipart/form-data; boundary=B", 413, "image_too_large"),
        (multipart({"a": b"1" * 1_100_000})[0], "multipart/form-data; boundary=B", 413, "body_too_large"),
        (multipart({str(n): b"1" for n in range(60)})[0], "multipart/form-data; boundary=B", 400, "not_multipart"),
    ],
)
def test_what_is_no_image_is_refused(bench, body, content_type, status, code):
    answer = bench.call("POST", "/v1/images", body, {"Content-Type": content_type})

    assert (answer.status, answer.json["code"]) == (status, code)
    assert published(bench) == []


def test_kafka_away_refuses_an_upload(bench):
    bench.broker.away = True

    answer = bench.post("/v1/images", {"uri": "https://x/1.jpg"})

    assert (answer.status, answer.json["code"]) == (503, "kafka_away")


# --- keys, limits, bad input ---


def test_a_key_is_needed_where_there_are_keys_and_the_page_is_open(make):
    key, entry = new_key("team")
    bench = make(api_keys=entry)

    assert bench.rerank(["a"]).status == 401
    assert bench.post("/v2/rerank", {"query": "a", "documents": []}, Authorization="Bearer wrong").status == 401
    assert bench.post("/v2/rerank", {"query": "a", "documents": []}, Authorization=f"Bearer {key}").status == 200
    assert bench.post("/v2/rerank", {"query": "a", "documents": []}, X_API_Key=key).status == 200
    assert bench.call("GET", "/").status == 200
    assert bench.call("GET", "/v1/images/x/thumbnail").status == 401


def test_pairs_in_flight_beyond_the_limit_are_refused_with_retry_after(make):
    bench = make(max_inflight_pairs=10)
    bench.worker.rule = bench.worker.never
    waiting = threading.Thread(target=bench.rerank, args=(["a"] * 8,), kwargs={"timeout_ms": 1_000})
    waiting.start()
    bench.eventually(lambda: bench.worker.requests)

    answer = bench.rerank(["a"] * 8)

    assert (answer.status, answer.json["code"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    waiting.join(LIMIT_S)
    bench.worker.rule = bench.worker.in_reverse
    assert bench.rerank(["a"] * 8).status == 200


def test_requests_beyond_the_rate_are_refused(make):
    bench = make(requests_per_s=1)

    statuses = [bench.rerank([]).status for _ in range(4)]

    assert statuses == [200, 200, 429, 429]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "not_json"),
        (b"{", 400, "not_json"),
        (b"\xff", 400, "not_json"),
        (b"[]", 422, "invalid_request"),
        (b"{}", 422, "invalid_request"),
        (json.dumps({"query": "a", "documents": ["x"] * 10_000}).encode(), 422, "too_many_documents"),
        (b'{"query": "' + b"a" * 2_000_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_a_bad_body_has_a_clear_answer(bench, body, status, code):
    answer = bench.call("POST", "/v2/rerank", body)

    assert (answer.status, answer.json["code"]) == (status, code)
    assert answer.json["message"]
    assert bench.value_of("edje_gateway_refused_total", code=code) == 1


def test_an_unknown_path_and_a_wrong_method_have_clear_answers(bench):
    assert bench.call("GET", "/nothing").json["code"] == "not_found"
    wrong = bench.call("GET", "/v2/rerank")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")


def test_an_unexpected_error_is_an_answer_without_its_text(bench):
    bench.worker.rule = bench.worker.never

    async def explode(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    bench.requests.ask = explode
    answer = bench.rerank(["a"])

    assert (answer.status, answer.json["code"]) == (500, "internal_error")
    assert b"secret" not in answer.data
    assert answer.json["trace_id"] == answer.headers["edje-trace-id"]


def test_a_body_that_arrives_too_slowly_is_refused(make):
    bench = make(body_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", bench.port), timeout=LIMIT_S) as connection:
        connection.sendall(b"POST /v2/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")

        assert connection.recv(1_000).startswith(b"HTTP/1.1 408")


def test_a_head_that_is_too_large_is_refused(bench):
    with socket.create_connection(("127.0.0.1", bench.port), timeout=LIMIT_S) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: " + b"a" * 40_000 + b"\r\n\r\n")

        assert connection.recv(1_000).startswith(b"HTTP/1.1 400")


def test_a_head_that_never_ends_is_cut_off(bench, monkeypatch):
    monkeypatch.setattr("workers.gateway.http_server.HEAD_TIMEOUT_S", 0.1)
    with socket.create_connection(("127.0.0.1", bench.port), timeout=LIMIT_S) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")

        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1_000) == b""


def test_connections_beyond_the_limit_are_answered(make):
    bench = make(max_connections=1)

    with socket.create_connection(("127.0.0.1", bench.port), timeout=LIMIT_S):
        assert bench.call("GET", "/openapi.json").status == 503


# --- callers that leave, many callers ---


def test_the_request_of_a_caller_that_hangs_up_is_cancelled(bench):
    bench.worker.rule = bench.worker.never
    body = json.dumps({"query": "a", "documents": ["a"]}).encode()
    head = b"POST /v2/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", bench.port), timeout=LIMIT_S) as connection:
        connection.sendall(head + body)
        bench.eventually(lambda: bench.worker.requests)

    bench.eventually(lambda: bench.worker.cancelled)
    assert bench.worker.cancelled == [bench.worker.requests[0].request_id]
    assert bench.value_of("edje_gateway_cancelled_total") == 1
    bench.eventually(lambda: bench.value_of("edje_gateway_pairs") == 0)


def test_two_thousand_callers_at_once_get_their_own_answers(make):
    bench = make(max_inflight_pairs=20_000)
    held = []
    bench.worker.rule = lambda request: held.append(request)

    async def ask(session: aiohttp.ClientSession, number: int) -> bool:
        body = {"query": "a", "documents": [f"{number}", f"{number}-b"], "return_documents": True, "timeout_ms": 30_000}
        async with session.post(f"http://127.0.0.1:{bench.port}/v2/rerank", json=body) as response:
            results = (await response.json())["results"]
            return [result["document"]["text"] for result in results] == [f"{number}-b", f"{number}"]

    async def ask_all() -> list[bool]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            asking = [asyncio.create_task(ask(session, number)) for number in range(2_000)]
            while len(held) < 2_000:
                await asyncio.sleep(0.02)
            for request in reversed(held):
                bench.loop.call_soon_threadsafe(bench.worker.reply, request, bench.worker.in_reverse(request))
            return await asyncio.gather(*asking)

    assert all(asyncio.run(ask_all()))


def test_a_drained_gateway_answers_what_is_in_work(make):
    bench = make()
    bench.worker.rule = bench.worker.never
    answers = []
    caller = threading.Thread(target=lambda: answers.append(bench.rerank(["a", "b"])))
    caller.start()
    bench.eventually(lambda: bench.worker.requests)

    bench.loop.call_soon_threadsafe(bench._stop.set)
    request = bench.worker.requests[0]
    bench.loop.call_soon_threadsafe(
        lambda: bench.loop.call_later(0.3, bench.worker.reply, request, bench.worker.in_reverse(request))
    )
    caller.join(LIMIT_S)

    assert answers[0].json["results"][0]["index"] == 1


# --- traces, documents ---


def test_a_callers_trace_goes_through_to_the_request_and_the_answer_names_it(bench):
    trace = "ab" * 16

    answer = bench.post("/v2/rerank", {"query": "a", "documents": ["a"]}, traceparent=f"00-{trace}-{'cd' * 8}-01")

    sent = dict(bench.worker.records[0].headers)["traceparent"].decode()
    assert sent.split("-")[1] == trace
    assert answer.headers["edje-trace-id"] == answer.json["trace_id"] == trace
    served = bench.recorded.one("POST /v2/rerank")
    assert f"{served.parent.span_id:016x}" == "cd" * 8
    bench.eventually(lambda: bench.recorded.named("send rerank.requests"))
    assert bench.recorded.one("send rerank.requests").parent.span_id == served.context.span_id


def test_requests_are_counted_and_timed_by_route(bench):
    bench.rerank(["a"])
    bench.call("GET", "/v1/images/some/id")

    assert bench.value_of("edje_http_requests_total", route="POST /v2/rerank", status="200") == 1
    route = "GET /v1/images/{image_id:path}"
    assert bench.value_of("edje_http_requests_total", route=route, status="404") == 1


def test_the_openapi_document_is_served_and_up_to_date(bench):
    assert bench.call("GET", "/openapi.json").json == openapi_document()
    assert json.loads(PATH.read_text()) == openapi_document(), "run: python -m workers.gateway.openapi"


def test_answers_allow_no_other_origin_and_no_script(bench):
    answer = bench.call("GET", "/v1/info", headers={"Origin": "https://evil.example"})

    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert answer.json["num_images"] == 0


def test_messages_with_image_bytes_are_msgpack(bench):
    bench.post("/v1/images", {"image_id": "two", "data": base64.b64encode(png()).decode()})

    [record] = bench.broker.log(TOPICS.images_new)
    assert dict(record.headers)["content-type"].decode() == MSGPACK


def test_a_dead_letter_that_cannot_be_read_hides_no_other(bench):
    topic = TOPICS.dead_letter(TOPICS.images_new)
    letter = DeadLetter("images.new", 0, 0, b"{}", b"one", (), "ImageError", "image_broken", "not an image", 1)

    def append() -> None:
        bench.broker.append(Outgoing(topic, b"bad", b"not a dead letter"))
        bench.broker.append(Outgoing(topic, letter.key, letter.value, letter.to_headers()))

    bench.loop.call_soon_threadsafe(append)

    bench.eventually(lambda: bench.call("GET", "/v1/images/one").json.get("status") == "failed")

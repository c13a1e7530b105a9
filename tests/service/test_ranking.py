"""From an image event to a ranked reply: both workers, the torch engine, and a client that knows only the contract."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from protocols.blob import blob_key
from protocols.events import ImageIndexed, RerankResponse
from service_harness import Service, reply_in
from service_worker import eventually
from workers.store.client import RedisStore

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), colour).save(file, "PNG")
    return file.getvalue()


def inline(colour: str) -> str:
    return base64.b64encode(picture(colour)).decode()


@pytest.fixture
def green_picture_url() -> Iterator[str]:
    class Green(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = picture("green")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Green) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/green.png"
        server.shutdown()
        thread.join()


def test_images_from_every_source_are_indexed_and_ranked_both_ways(
    service: Service, tmp_path: Path, green_picture_url: str
):
    (tmp_path / "blue.png").write_bytes(picture("blue"))
    ingest = service.start(
        "ingest",
        engine="torch",
        num_threads=1,
        allowed_schemes="file,http",
        file_roots=tmp_path,
        allow_private_addresses=True,
    )
    rerank = service.start("rerank", engine="torch", num_threads=1, max_batch_pairs=128)
    service.announce("red", data=inline("red"))
    service.announce("blue", uri=(tmp_path / "blue.png").as_uri())
    service.announce("green", uri=green_picture_url, metadata={"colour": "green"})
    service.flush()

    ingest.wait_ready()
    indexed = service.tap(service.topics.images_indexed).wait_ids(["red", "blue", "green"])

    layout = service.checkpoint.layout
    for image, records in indexed.items():
        event = ImageIndexed.model_validate_json(records[0].value)
        assert (event.image_id, event.model, event.skipped) == (image, layout.model_digest, False)
        assert event.content_sha256 == hashlib.sha256(picture(image)).hexdigest()
        assert (event.num_tokens, event.dtype, event.num_bytes) == (layout.num_tokens, "int8", layout.blob_bytes)

    service.ask("to-images", ["red", "nowhere", "blue", "green", "red"])
    captions = [{"text": "a red wall", "id": "c0"}, {"text": "a green field"}, {"text": "a red wall"}]
    service.ask("to-texts", [], query={"image_id": "red"}, candidates=captions, top_n=2)
    service.ask("nothing", [])
    service.flush()
    rerank.wait_ready()
    replies = service.replies().wait_ids(["to-images", "to-texts", "nothing"])

    to_images = RerankResponse.model_validate_json(replies["to-images"][0].value)
    assert (to_images.status, to_images.missing) == ("partial", ["nowhere"])
    assert sorted((result.index, result.id) for result in to_images.results) == [
        (0, "red"),
        (2, "blue"),
        (3, "green"),
        (4, "red"),
    ]
    scores = [result.relevance_score for result in to_images.results]
    assert scores == sorted(scores, reverse=True)
    assert {"inbox", "queue", "fetch", "batch_wait", "score", "total"} == set(to_images.timings_ms)
    to_texts = RerankResponse.model_validate_json(replies["to-texts"][0].value)
    assert to_texts.status == "ok"
    assert len(to_texts.results) == 2
    assert all(result.id == {0: "c0"}.get(result.index) for result in to_texts.results)
    nothing = RerankResponse.model_validate_json(replies["nothing"][0].value)
    assert (nothing.status, nothing.results) == ("ok", [])
    assert (ingest.stop(), rerank.stop()) == (0, 0)


def test_the_same_content_is_skipped_and_changed_content_replaces_it(service: Service):
    ingest = service.ingest()
    indexed = service.tap(service.topics.images_indexed)
    store, key = RedisStore(service.redis_url), blob_key(service.checkpoint.layout.model_digest, "wall")
    seen = []

    for number, colour in enumerate(["red", "red", "blue"], start=1):
        service.announce("wall", data=inline(colour))
        service.flush()
        event = reply_in(indexed.wait_for(number)[-1])
        seen.append((event["skipped"], event["content_sha256"] == hashlib.sha256(picture(colour)).hexdigest()))
        (blob,) = store.get_many([key])
        assert hashlib.sha256(picture(colour)).digest() in blob

    store.close()
    assert seen == [(False, True), (True, True), (False, True)]
    assert ingest.metric("edje_events_total", outcome="skipped") == 1


def test_a_rerank_worker_sees_changed_and_removed_images_that_it_has_loaded_before(service: Service):
    ingest = service.ingest()
    rerank = service.start("rerank", engine="torch", num_threads=1, max_batch_pairs=128).wait_ready()
    indexed, replies = service.tap(service.topics.images_indexed), service.replies()
    seen = []

    for number, colour in enumerate(["red", "blue", "red"], start=1):
        service.announce("wall", data=inline(colour))
        service.flush()
        indexed.wait_for(number)
        for copy in range(2):
            service.ask(f"{colour}-{number}-{copy}", ["wall"])
            service.flush()
            (reply,) = replies.wait_ids([f"{colour}-{number}-{copy}"])[f"{colour}-{number}-{copy}"]
            if copy:  # the first may have come before the event
                seen.append(reply_in(reply)["results"][0]["logit"])
    service.publish(service.topics.images_new, None, "wall")
    service.flush()
    indexed.wait_for(4)

    def is_gone() -> bool:
        name = f"gone-{len(replies.records)}"
        service.ask(name, ["wall"])
        service.flush()
        return reply_in(replies.wait_ids([name])[name][0])["missing"] == ["wall"]

    eventually(is_gone, "the removed image is missing")
    red, blue, red_again = seen
    assert red == red_again != blue
    assert rerank.metric("edje_slab_invalidations_total") >= 2
    assert (ingest.stop(), rerank.stop()) == (0, 0)

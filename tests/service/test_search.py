"""From an uploaded picture to a search that finds it: gateway, index worker and both other workers on real servers."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from edje.checkpoint import read_config, read_digest
from edje.data.scenes.dataset import holdout, write_scenes
from protocols.blob import BlobLayout
from server_process import free_port
from service_harness import Checkpoint, Service
from service_worker import eventually
from workers.index.tables import table_of

pytest_plugins = ["service_fixtures"]
pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

SCENES = Path(__file__).parents[2] / "deploy" / "models" / "scenes"
NUM_SCENES = 24


@dataclass
class Gateway:
    """The HTTP side of a running gateway."""

    address: str

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def post(self, path: str, body: Any) -> Any:
        status, answer = self.call("POST", path, body)
        assert status < 300, answer
        return answer


def start_search(service: Service, database_url: str, **gateway_settings: object) -> Gateway:
    """Start every worker over the shipped model."""
    port = free_port()
    model = {"checkpoint": SCENES, "engine": "torch", "num_threads": 1}
    service.variables["DATABASE_URL"] = database_url
    started = [
        service.start("ingest", **model, publish_embedding=True, thumbnails=True),
        service.start("rerank", **model),
        service.start_plain("index", checkpoint=SCENES, group_id=f"{service.topics.prefix}index"),
        service.start_plain("gateway", checkpoint=SCENES, port=port, timeout_ms=20_000, **gateway_settings),
    ]
    for worker in started:
        worker.wait_ready()
    return Gateway(f"http://127.0.0.1:{port}")


def pictures(folder: Path) -> dict[str, bytes]:
    write_scenes(folder, "test", NUM_SCENES, seed=1, size=96)
    return {path.stem: path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def form(name: str, data: bytes) -> tuple[bytes, dict[str, str]]:
    head = f'--B\r\nContent-Disposition: form-data; name="file"; filename="{name}.png"\r\n\r\n'.encode()
    return head + data + b"\r\n--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"}


@pytest.fixture
def scenes_service(make_service, kafka_brokers, redis_url, database_url):
    service = make_service(kafka_brokers, redis_url)
    config = read_config(SCENES)
    service.checkpoint = Checkpoint(
        SCENES, BlobLayout(read_digest(SCENES), config.adapter.num_tokens, config.joint.dim, "int8")
    )
    yield service
    with psycopg.connect(database_url) as connection:  # the digest is the same for every test of this model
        connection.execute(f"DROP TABLE IF EXISTS {table_of(read_digest(SCENES))}")


def test_uploaded_pictures_are_found_reranked_and_removed(scenes_service, database_url, tmp_path):
    gateway = start_search(scenes_service, database_url)
    files = pictures(tmp_path / "scenes")
    caption = next(image.captions[0] for image in holdout(NUM_SCENES, seed=1).images)
    right = holdout(NUM_SCENES, seed=1).images[0].image_id

    for name, data in files.items():
        body, headers = form(name, data)
        assert gateway.call("POST", "/v1/images", body, headers)[0] == 202
    eventually(lambda: gateway.call("GET", "/v1/info")[1].get("num_images") == len(files), "all pictures are indexed")
    found = gateway.post("/v1/search", {"query": caption, "top_n": 3, "candidates": 20})

    by_name = {hashlib.sha256(data).hexdigest()[:32]: name for name, data in files.items()}
    assert found["degraded"] is None
    assert by_name[found["results"][0]["image_id"]] == right
    assert found["results"][0]["metadata"]["name"] == f"{right}.png"
    assert found["timings_ms"]["score"] > 0

    best = found["results"][0]["image_id"]
    explained = gateway.post("/v2/rerank", {"query": caption, "documents": [{"image_id": best}], "explain": True})
    words = explained["results"][0]["explanation"]
    assert {word["word"] for word in words} <= set(caption.replace(",", " ").split())
    assert {len(word["similarities"]) for word in words} == {9}  # the shipped model's visual tokens
    with urllib.request.urlopen(f"{gateway.address}/v1/images/{best}/thumbnail", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("image/")
        assert len(answer.read()) <= 12 * 1024
    assert gateway.call("DELETE", f"/v1/images/{best}")[0] == 202
    eventually(lambda: gateway.call("GET", f"/v1/images/{best}")[0] == 404, "the picture is removed")
    again = gateway.post("/v1/search", {"query": caption, "top_n": 3})
    assert best not in [result["image_id"] for result in again["results"]]


def test_without_rerank_workers_the_search_is_degraded_and_without_postgres_it_is_an_error(
    scenes_service, private_postgres, tmp_path
):
    postgres = private_postgres()
    gateway = start_search(scenes_service, postgres.url)
    body, headers = form("one", next(iter(pictures(tmp_path / "scenes").values())))
    gateway.call("POST", "/v1/images", body, headers)
    eventually(lambda: gateway.call("GET", "/v1/info")[1].get("num_images") == 1, "the picture is indexed")

    for worker in scenes_service.workers:
        if worker.kind == "rerank":
            worker.kill()
    found = gateway.post("/v1/search", {"query": "a red circle", "timeout_ms": 500})
    assert found["degraded"] in ("timeout", "expired")
    assert len(found["results"]) == 1

    postgres.kill()
    status, answer = gateway.call("POST", "/v1/search", {"query": "a blue circle"})
    assert (status, answer["code"]) == (503, "index_away")
    postgres.start()
    eventually(
        lambda: gateway.call("POST", "/v1/search", {"query": "a red circle", "timeout_ms": 500})[0] == 200,
        "the index is back",
    )

"""Image events that can never succeed, sent to one ingest worker that must survive all of them."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from protocols.blob import blob_key
from protocols.source_position import is_removal_marker
from server_process import free_port
from service_harness import Service, letter_in
from service_worker import eventually
from workers.store.client import RedisStore

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services


def good_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


def bomb_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """Return an image of a few hundred bytes that would decode to ten gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a web server with one image and a redirect to it."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/image.png")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = good_png() if self.path == "/image.png" else b"not here"
            self.send_response(200 if self.path == "/image.png" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_each_bad_image_is_dead_lettered_with_its_cause_and_the_next_one_is_indexed(
    service: Service, tmp_path: Path, web: int
):
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "link.png").symlink_to("/etc/passwd")
    worker = service.ingest(
        allowed_schemes="file,http",
        file_roots=root,
        allowed_hosts="localhost",  # not 127.0.0.1, although the name resolves to it
        allow_private_addresses=True,
        max_image_bytes="2MiB",
    )
    bad_images = {
        "bomb": ({"data": base64_of(bomb_png())}, "image_too_many_pixels"),
        "truncated": ({"data": base64_of(good_png()[:2_000])}, "image_truncated"),
        "no-image": ({"data": base64_of(b"GIF, said nobody")}, "not_an_image"),
        "no-base64": ({"data": "***"}, "invalid_event"),
        "no-source": ({}, "invalid_event"),
        "two-sources": ({"data": base64_of(good_png()), "uri": "http://localhost/x"}, "invalid_event"),
        "future": ({"schema_version": 7, "uri": "http://localhost/x"}, "unsupported_version"),
        "not-found": ({"uri": f"http://localhost:{web}/nothing.png"}, "image_not_found"),
        "redirected": ({"uri": f"http://localhost:{web}/away"}, "uri_not_allowed"),
        "other-host": ({"uri": f"http://127.0.0.1:{web}/image.png"}, "uri_not_allowed"),
        "passwords": ({"uri": "file:///etc/passwd"}, "uri_not_allowed"),
        "linked": ({"uri": (root / "link.png").as_uri()}, "uri_not_allowed"),
        "no-file": ({"uri": (root / "none.png").as_uri()}, "image_not_found"),
        "other-scheme": ({"uri": "ftp://localhost/image.png"}, "uri_not_allowed"),
        "empty-label": ({"uri": "http://images..example.com/a.jpg"}, "uri_invalid"),
        "long-label": ({"uri": f"http://{'a' * 64}.example.com/a.jpg"}, "uri_invalid"),
        "bad-port": ({"uri": "http://localhost:99999/a.jpg"}, "uri_invalid"),
        "bad-idna": ({"uri": "http://\u2603\u200d..example/a.jpg"}, "uri_invalid"),
        "escaped-host": ({"uri": "http://local%68ost/a.jpg"}, "uri_invalid"),
        "password": ({"uri": "http://user:pw@localhost/a.jpg"}, "uri_not_allowed"),
        "data-address": ({"uri": "data:image/png;base64,AAAA"}, "uri_invalid"),
    }

    for image, (fields, _) in bad_images.items():
        service.announce(image, **fields)
    service.publish(service.topics.images_new, b"{", "undecodable")
    service.announce("good", uri=f"http://localhost:{web}/image.png")
    service.flush()
    letters = service.dead_letters(service.topics.images_new).wait_ids([*bad_images, "undecodable"])
    indexed = service.tap(service.topics.images_indexed).wait_ids(["good"])

    found = {image: letter_in(records[0]).error_code for image, records in letters.items()}
    assert found == {image: code for image, (_, code) in bad_images.items()} | {"undecodable": "undecodable"}
    assert all(letter_in(record).message for records in letters.values() for record in records)
    assert {image: len(records) for image, records in letters.items()} == dict.fromkeys(found, 1)
    assert list(indexed) == ["good"]
    assert worker.metric("edje_events_total", outcome="dead_letter") == len(found)
    assert worker.stop() == 0


def test_private_addresses_are_refused_by_number_and_by_name_unless_they_are_allowed(service: Service, web: int):
    service.ingest()
    addresses = {
        "loopback": f"http://127.0.0.1:{web}/image.png",
        "by-name": f"http://localhost:{web}/image.png",
        "ipv6": f"http://[::1]:{web}/image.png",
        "mapped": f"http://[::ffff:127.0.0.1]:{web}/image.png",
        "private": "http://10.0.0.1/image.png",
        "metadata-service": "http://169.254.169.254/latest/meta-data",
        "mapped-metadata": "http://[::ffff:169.254.169.254]/latest/meta-data",
    }

    for image, uri in addresses.items():
        service.announce(image, uri=uri)
    service.flush()
    letters = service.dead_letters(service.topics.images_new).wait_ids(addresses)

    assert {letter_in(records[0]).error_code for records in letters.values()} == {"uri_not_allowed"}


class Host(ThreadingHTTPServer):
    """Serves an image; /busy answers 429 until `busy_until`, /slow sends a byte each second."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HostPages)
        self.busy_until = 0.0
        self.ended = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore that a worker closes the connection."""


class _HostPages(BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        if self.path.startswith("/busy") and time.monotonic() < self.server.busy_until:
            self.send_response(429)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = good_png()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path.startswith("/slow"):
            for byte in body:
                self.wfile.write(bytes([byte]))
                if self.server.ended.wait(1.0):
                    return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hosts() -> Iterator[Callable[[], Host]]:
    running: list[tuple[Host, threading.Thread]] = []

    def start() -> Host:
        host = Host()
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        running.append((host, thread))
        return host

    yield start
    for host, thread in running:
        host.ended.set()
        host.shutdown()
        thread.join()
        host.server_close()


def test_a_host_that_is_slow_busy_or_away_for_a_while_delays_no_other_image(service: Service, hosts):
    slow, busy, away, fast = hosts(), hosts(), free_port(), hosts()
    busy.busy_until = time.monotonic() + 8.0
    worker = service.ingest(allow_private_addresses=True, allowed_schemes="http")

    for number in range(8):
        service.announce(f"slow-{number}", uri=f"http://127.0.0.1:{slow.server_port}/slow/{number}")
        service.announce(f"busy-{number}", uri=f"http://127.0.0.1:{busy.server_port}/busy/{number}")
        service.announce(f"away-{number}", uri=f"http://127.0.0.1:{away}/{number}")
    service.flush()
    for number in range(5):
        service.announce(f"fast-{number}", uri=f"http://127.0.0.1:{fast.server_port}/{number}")
    service.flush()
    started = time.monotonic()
    indexed = service.tap(service.topics.images_indexed)
    found = indexed.wait_ids([f"fast-{number}" for number in range(5)])
    fast_took_s = time.monotonic() - started
    late = ThreadingHTTPServer(("127.0.0.1", away), _HostPages)
    late.busy_until, late.ended = 0.0, threading.Event()
    thread = threading.Thread(target=late.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        indexed.wait_ids([f"{kind}-{number}" for kind in ("busy", "away") for number in range(8)])
    finally:
        late.shutdown()
        thread.join()
        late.server_close()

    assert not {image for image in found if image.startswith("slow")}
    assert fast_took_s < 10.0  # one or two seconds on an idle machine
    assert worker.metric("edje_dead_letters_total", code="image_unavailable") == 0
    assert worker.metric("edje_retries_total", kind="image_fetch") > 0


def test_a_tombstone_removes_the_image_and_is_published_to_images_indexed(service: Service):
    worker = service.ingest()
    service.announce("img", data=base64_of(good_png()))
    service.announce("other", data=base64_of(good_png()))
    service.flush()
    indexed = service.tap(service.topics.images_indexed)
    indexed.wait_ids(["img", "other"])

    service.publish(service.topics.images_new, None, "img")
    service.flush()
    eventually(lambda: None in [record.value for record in indexed.pull()], "the tombstone is published")

    (tombstone,) = [record for record in indexed.records if record.value is None]
    assert tombstone.key == b"img"
    store, digest = RedisStore(service.redis_url), service.checkpoint.layout.model_digest
    removed, kept = store.get_many([blob_key(digest, "img"), blob_key(digest, "other")])
    store.close()
    assert is_removal_marker(removed)
    assert len(kept) == service.checkpoint.layout.blob_bytes
    assert worker.metric("edje_events_total", outcome="removed") == 1
    assert worker.metric("edje_events_total", outcome="dead_letter") == 0

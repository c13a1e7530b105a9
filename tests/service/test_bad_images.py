"""Image events that can never succeed, sent to one ingest worker that has to survive them all."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from service_harness import Service, letter_in

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services


def good_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


def bomb_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A few hundred bytes that would decode to ten gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a web server with an image, a redirect to its address, and nothing else."""

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
        allowed_hosts="localhost",  # not 127.0.0.1, though the name leads there
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
    }

    for image, uri in addresses.items():
        service.announce(image, uri=uri)
    service.flush()
    letters = service.dead_letters(service.topics.images_new).wait_ids(addresses)

    assert {letter_in(records[0]).error_code for records in letters.values()} == {"uri_not_allowed"}

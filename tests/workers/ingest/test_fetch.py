"""Fetching from hostile servers and folders, all of them local."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from workers.errors import Misconfigured, Poison, Transient
from workers.ingest.address_policy import AddressPolicy
from workers.ingest.addresses import parse_address
from workers.ingest.fetch import ImageFetcher
from workers.ingest.fetch_http import FetchLimits, decoded_body, retry_after_s
from workers.ingest.scheduling import Unavailable

LIMITS = FetchLimits(max_bytes=1000, max_redirects=3, timeout_s=5.0)
SECRET = "sesame"  # in every query and password below; must be in no message


class Server(ThreadingHTTPServer):
    """Answers each path with a function of the test's."""

    daemon_threads = True

    def __init__(self, host: str) -> None:
        super().__init__((host, 0), Handler)
        self.answers: dict[str, Callable[[Handler], None]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.ended = threading.Event()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def url(self, path: str, host: str = "") -> str:
        return f"http://{host or self.server_address[0]}:{self.port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what many of these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        self.close_connection = True
        self.server.answers[self.path.partition("?")[0]](self)

    def log_message(self, *args: object) -> None:
        """Keep stderr for failures."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def pause(self) -> None:
        """Until the test is over."""
        self.server.ended.wait(30)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []
    threads: list[threading.Thread] = []

    def start(host: str = "127.0.0.1", **answers: Callable[[Handler], None]) -> Server:
        server = Server(host)
        server.answers = {f"/{name}": answer for name, answer in answers.items()}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append(server)
        threads.append(thread)
        return server

    yield start
    for server, thread in zip(servers, threads, strict=True):
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def policy(**changes: object) -> AddressPolicy:
    fields: dict[str, object] = {
        "schemes": frozenset({"http", "https", "file"}),
        "hosts": (),
        "ports": frozenset(),
        "file_roots": (),
        "allow_private_addresses": True,
    }
    return AddressPolicy(**{**fields, **changes})


class Fetcher(ImageFetcher):
    """Waits for each fetch."""

    def fetch(self, uri: str) -> bytes:
        return self.start(parse_address(uri)).result(20)


@pytest.fixture
def fetcher() -> Iterator[Callable[..., Fetcher]]:
    made: list[Fetcher] = []

    def make(rules: AddressPolicy | None = None, limits: FetchLimits = LIMITS, **options: object) -> Fetcher:
        made.append(Fetcher(rules or policy(), limits, max_fetches=8, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Names(AbstractResolver):
    """A name service that returns the test's answers: a list of addresses for each look-up, or an error."""

    def __init__(self, *answers: list[str] | Exception) -> None:
        self.answers = list(answers)

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in answer
        ]

    async def close(self) -> None:
        """Nothing is open."""


class OneGoodAddress(AddressPolicy):
    """Allows public addresses, and 127.0.0.2 in the role of the internet."""

    def check_address(self, address: str) -> None:
        if address != "127.0.0.2":
            super().check_address(address)


@pytest.fixture
def internet(serve) -> Callable[..., Server]:
    try:
        socket.create_server(("127.0.0.2", 0)).close()
    except OSError:
        pytest.skip("this system has one loopback address only")
    return lambda **answers: serve("127.0.0.2", **answers)


def strict() -> AddressPolicy:
    return OneGoodAddress(frozenset({"http", "https"}), (), frozenset(), (), False)


def poison(fetcher: Fetcher, uri: str) -> Poison:
    with pytest.raises(Poison) as caught:
        fetcher.fetch(uri)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 600
    return caught.value


def transient(fetcher: Fetcher, uri: str) -> str:
    return str(unavailable(fetcher, uri))


def unavailable(fetcher: Fetcher, uri: str) -> Transient:
    with pytest.raises(Transient) as caught:
        fetcher.fetch(uri)
    assert SECRET not in str(caught.value)
    return caught.value


# --- http ---


def test_an_image_is_read_whole_and_the_query_is_sent_as_written(serve, fetcher):
    server = serve(a=lambda request: request.answer(200, b"x" * 1000))

    assert fetcher().fetch(server.url("/a?sig=a%2Bb%2Fc&d=%20")) == b"x" * 1000

    path, headers = server.seen[0]
    assert path == "/a?sig=a%2Bb%2Fc&d=%20"
    assert headers["Accept-Encoding"] == "identity"


def test_many_threads_fetch_at_once(serve, fetcher):
    server = serve(a=lambda request: request.answer(200, b"image"))
    one = fetcher()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one.fetch, [server.url("/a")] * 40)) == [b"image"] * 40


def test_a_body_over_the_limit_is_refused_by_its_length(serve, fetcher):
    server = serve(a=lambda request: request.answer(200, b"x" * 1001))

    assert poison(fetcher(), server.url(f"/a?{SECRET}")).code == "image_too_large"


def test_an_endless_body_is_cut_off(serve, fetcher):
    def endless(request: Handler) -> None:
        request.send_response(200)
        request.end_headers()
        while True:
            request.wfile.write(b"x" * 500)

    assert poison(fetcher(), serve(a=endless).url("/a")).code == "image_too_large"


def test_an_endless_chunked_body_is_cut_off(serve, fetcher):
    def endless(request: Handler) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        while True:
            request.wfile.write(b"40\r\n" + b"x" * 64 + b"\r\n")

    assert poison(fetcher(), serve(a=endless).url("/a")).code == "image_too_large"


def test_a_body_shorter_than_its_length_is_a_broken_transfer(serve, fetcher):
    server = serve(a=lambda request: request.answer(200, b"short", Content_Length="900"))

    assert "ClientPayloadError" in transient(fetcher(), server.url(f"/a?{SECRET}"))


def test_bytes_beyond_the_content_length_are_not_read(serve, fetcher):
    server = serve(a=lambda request: request.answer(200, b"x" * 5000, Content_Length="10"))

    with contextlib.suppress(Transient):  # where the surplus has arrived already, the client sees a broken answer
        assert fetcher().fetch(server.url("/a")) == b"x" * 10


PICTURE = b"\xff\xd8\xff\xe0 a small JPEG"


@pytest.mark.parametrize(
    "encoding", ["", "identity", "none", "binary", "aws-chunked", "utf-8", "gzip", "br", "x-anything"]
)
def test_an_encoding_that_the_body_does_not_have_is_ignored(serve, fetcher, encoding):
    server = serve(a=lambda request: request.answer(200, PICTURE, Content_Encoding=encoding))

    assert fetcher().fetch(server.url("/a")) == PICTURE


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("X-GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("aws-chunked, gzip", gzip.compress),
        ("gzip, gzip", lambda body: gzip.compress(gzip.compress(body))),
        ("gzip", lambda body: gzip.compress(body[:9]) + gzip.compress(body[9:])),
        ("deflate", lambda body: zlib.compress(body)[2:-4]),
    ],
)
def test_a_compressed_body_is_decompressed(serve, fetcher, encoding, compress):
    server = serve(a=lambda request: request.answer(200, compress(PICTURE), Content_Encoding=encoding))

    assert fetcher().fetch(server.url("/a")) == PICTURE


@pytest.mark.parametrize("layers", [1, 2])
def test_a_gzip_bomb_is_bounded(serve, fetcher, layers):
    bomb = b"\0" * 50_000_000
    for _ in range(layers):
        bomb = gzip.compress(bomb)
    limits = FetchLimits(max_bytes=100_000, max_redirects=3, timeout_s=5.0)
    server = serve(a=lambda request: request.answer(200, bomb, Content_Encoding=", ".join(["gzip"] * layers)))

    assert poison(fetcher(limits=limits), server.url("/a")).code == "image_too_large"


def test_a_bomb_of_many_empty_members_ends():
    bomb = gzip.compress(b"") * 2_000

    assert decoded_body(bomb, ["gzip"], 1_000, "here") == b""


@pytest.mark.timeout(10)
def test_a_bomb_of_a_million_empty_members_is_refused_within_moments():
    with pytest.raises(Poison, match="more than 10000 members") as refused:
        decoded_body(gzip.compress(b"") * 1_000_000, ["gzip"], 32 << 20, "here")

    assert refused.value.code == "http_refused"


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("br", b"compressed"),
        ("zstd", b"compressed"),
        ("gzip", b"not gzip"),
        ("gzip", gzip.compress(b"x" * 99, mtime=0)[:20]),
    ],
)
def test_an_encoding_that_cannot_be_read_is_refused(serve, fetcher, encoding, body):
    server = serve(a=lambda request: request.answer(200, body, Content_Encoding=encoding))

    error = poison(fetcher(), server.url("/a"))

    assert error.code == "http_refused"
    assert "compressed" in str(error)


def test_a_slow_body_runs_out_of_time(serve, fetcher):
    def slow(request: Handler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "100")
        request.end_headers()
        request.wfile.write(b"x")
        request.pause()

    one = fetcher(limits=FetchLimits(max_bytes=1000, max_redirects=3, timeout_s=0.1))
    assert "no answer within 0.1 s" in transient(one, serve(a=slow).url(f"/a?{SECRET}"))


def test_slow_hosts_hold_no_threads(serve, fetcher):
    def slow(request: Handler) -> None:
        request.pause()

    one = fetcher()
    server = serve(slow=slow, fast=lambda request: request.answer(200, b"image"))
    held = [one.start(parse_address(server.url("/slow"))) for _ in range(50)]

    assert one.fetch(server.url("/fast")) == b"image"
    assert not any(future.done() for future in held)


def test_dripping_headers_do_not_prolong_the_time(serve, fetcher):
    def drip(request: Handler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not request.server.ended.wait(0.01):
            request.wfile.write(b"x-a: b\r\n")

    one = fetcher(limits=FetchLimits(max_bytes=1000, max_redirects=3, timeout_s=0.2))
    transient(one, serve(a=drip).url("/a"))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (204, "http_refused"),
        (206, "http_refused"),
        (304, "http_refused"),
        (400, "http_refused"),
        (401, "image_forbidden"),
        (403, "image_forbidden"),
        (404, "image_not_found"),
        (410, "image_not_found"),
    ],
)
def test_a_final_status_is_poison(serve, fetcher, status, code):
    server = serve(a=lambda request: request.answer(status))

    error = poison(fetcher(), server.url(f"/a?sig={SECRET}"))

    assert error.code == code
    assert str(status) in str(error)
    assert "/a" in str(error)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_passing_status_is_transient_and_the_next_try_may_work(serve, fetcher, status):
    statuses = [200, status]
    server = serve(a=lambda request: request.answer(statuses.pop(), b"image"))
    one = fetcher()

    assert str(status) in transient(one, server.url(f"/a?sig={SECRET}"))
    assert one.fetch(server.url("/a")) == b"image"


@pytest.mark.parametrize("status", [429, 503])
def test_the_pause_that_a_host_asks_for_is_reported(serve, fetcher, status):
    server = serve(a=lambda request: request.answer(status, Retry_After="7"))

    error = unavailable(fetcher(), server.url("/a"))

    assert isinstance(error, Unavailable)
    assert error.retry_after_s == 7.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        (" 12 ", 12.0),
        ("1.5", 1.5),
        ("Wed, 21 Oct 2015 07:28:10 GMT", 10.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Wednesday, 21-Oct-15 07:28:10 GMT", 10.0),
        ("soon", None),
        ("-5", None),
        ("", None),
        ("9" * 400, None),
        ("Wed, 99 Oct 2015 99:28:10 GMT", None),
        ("٣", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert retry_after_s(header, now=1_445_412_480.0) == seconds


def test_a_refused_connection_is_transient(fetcher):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    transient(fetcher(), f"http://127.0.0.1:{port}/a?{SECRET}")


def test_a_server_that_hangs_up_is_transient(serve, fetcher):
    transient(fetcher(), serve(a=lambda request: None).url("/a"))


def test_closing_the_fetcher_cancels_a_fetch_under_way(serve, fetcher):
    reached = threading.Event()

    def never(request: Handler) -> None:
        reached.set()
        request.pause()

    one = fetcher()
    under_way = one.start(parse_address(serve(a=never).url("/a")))
    assert reached.wait(10)
    one.close()

    with pytest.raises(CancelledError):
        under_way.result(timeout=3)


# --- redirects ---


def redirect(to: str, status: int = 302) -> Callable[[Handler], None]:
    return lambda request: request.answer(status, Location=to)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(serve, fetcher, status):
    server = serve(a=redirect("/b?x=1", status), b=lambda request: request.answer(200, b"image"))

    assert fetcher().fetch(server.url("/a")) == b"image"


def test_redirects_are_bounded(serve, fetcher):
    server = serve(a=redirect("/a"))

    assert "more than 3 redirects" in str(poison(fetcher(), server.url("/a")))
    assert len(server.seen) == 4


@pytest.mark.parametrize("with_name", [False, True])
def test_a_redirect_to_this_machine_is_refused_before_it_is_reached(internet, serve, fetcher, with_name):
    inside = serve(secret=lambda request: request.answer(200, b"inside"))
    host = "innocent.example" if with_name else "127.0.0.1"
    outside = internet(a=redirect(f"http://{host}:{inside.port}/secret?{SECRET}"))

    error = poison(fetcher(strict(), resolver=Names(["127.0.0.1"])), outside.url("/a"))

    assert error.code == "uri_not_allowed"
    assert len(outside.seen) == 1
    assert inside.seen == []


@pytest.mark.parametrize(
    "to",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.2/a",
        f"http://user:{SECRET}@127.0.0.2/a",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[fe80::1%25eth0]/",
        "http://2130706433/",
        "http://127.1/",
        "http://0x7f.0.0.1/",
        "//10.0.0.1/a",
        "http://",
        "http://a:99999/",
        "",
    ],
)
def test_a_redirect_to_a_forbidden_address_is_refused(internet, fetcher, to):
    outside = internet(a=redirect(to))

    poison(fetcher(strict(), resolver=Names(["127.0.0.1"])), outside.url("/a"))


def test_a_redirect_to_a_host_that_is_not_listed_is_refused(serve, fetcher):
    server = serve(a=redirect("http://elsewhere.example/"))

    assert "elsewhere.example" in str(poison(fetcher(policy(hosts=("127.0.0.1",))), server.url("/a")))


# --- names and addresses ---


def test_a_name_that_leads_to_a_private_address_is_refused(serve, fetcher):
    inside = serve(a=lambda request: request.answer(200, b"inside"))
    one = fetcher(strict(), resolver=Names(["127.0.0.1"]))

    assert poison(one, inside.url("/a", host="innocent.example")).code == "uri_not_allowed"
    assert inside.seen == []


def test_a_name_that_leads_elsewhere_the_second_time_is_judged_by_the_address_of_the_socket(internet, serve, fetcher):
    outside = internet(a=lambda request: request.answer(200, b"outside"))
    one = fetcher(strict(), resolver=Names(["127.0.0.2"], ["127.0.0.1"]))

    assert one.fetch(outside.url("/a", host="rebinding.example")) == b"outside"
    assert poison(one, outside.url("/a", host="rebinding.example")).code == "uri_not_allowed"


def test_a_private_address_behind_an_unreachable_public_one_is_not_tried(internet, fetcher):
    with socket.create_server(("127.0.0.2", 0)) as closed:
        port = closed.getsockname()[1]
    one = fetcher(strict(), resolver=Names(["127.0.0.2", "127.0.0.1"]))

    assert poison(one, f"http://two.example:{port}/").code == "uri_not_allowed"


def test_a_name_that_does_not_exist_is_tried_for_a_shorter_time(fetcher):
    gone = Names(socket.gaierror(socket.EAI_NONAME, "no such name"))
    away = Names(socket.gaierror(socket.EAI_AGAIN, "try again"))

    error = unavailable(fetcher(resolver=gone), f"http://a.example/?{SECRET}")

    assert isinstance(error, Unavailable)
    assert error.give_up_after_s == 30.0
    assert "looked up" in transient(fetcher(resolver=away), f"http://a.example/?{SECRET}")


def test_a_host_name_that_only_the_resolver_refuses_is_invalid(fetcher):
    one = fetcher(resolver=Names(UnicodeError("label empty or too long")))

    assert poison(one, "http://a.example/").code == "uri_invalid"


def test_a_proxy_of_the_environment_is_not_used(serve, fetcher, monkeypatch):
    server = serve(a=lambda request: request.answer(200, b"image"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    assert fetcher().fetch(server.url("/a")) == b"image"


@pytest.mark.parametrize(
    "to", ["http://images..example.com/", "http://a:99999/", "http://[::1", "http://\udcff/", "https://" + "a" * 300]
)
def test_a_redirect_to_an_invalid_address_is_refused(serve, fetcher, to):
    server = serve(a=redirect(to.encode("utf-8", "surrogateescape").decode("latin-1")))

    assert poison(fetcher(), server.url("/a")).code == "http_refused"


def test_a_backslash_does_not_hide_the_host(internet, fetcher):
    poison(fetcher(strict(), resolver=Names(["127.0.0.1"])), "http://127.0.0.1\\@127.0.0.2/")


# --- files ---


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a b%1#?ä.jpg").write_bytes(b"image")
    (folder / "large.jpg").write_bytes(b"x" * 1001)
    (tmp_path / "outside.txt").write_bytes(b"outside")
    return folder


def test_a_file_under_a_root_is_read(fetcher, root):
    assert fetcher(policy(file_roots=(root,))).fetch((root / "a b%1#?ä.jpg").as_uri()) == b"image"


def test_a_file_root_may_be_a_symbolic_link(fetcher, root, tmp_path):
    (tmp_path / "link").symlink_to(root)

    uri = (tmp_path / "link" / "a b%1#?ä.jpg").as_uri()

    assert fetcher(policy(file_roots=(tmp_path / "link",))).fetch(uri) == b"image"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "{root}/../outside.txt",
        "{root}/%2e%2e/outside.txt",
        "{root}-other/a",
        "{root}/link",
        "{root}/dir/b",
    ],
)
def test_a_file_outside_the_roots_is_refused_however_it_is_named(fetcher, root, tmp_path, path):
    (root / "link").symlink_to(tmp_path / "outside.txt")
    (root / "dir").symlink_to(tmp_path)
    (tmp_path / "images-other").mkdir()

    error = poison(fetcher(policy(file_roots=(root,))), "file://" + path.format(root=root))

    assert error.code == "uri_not_allowed"
    assert "outside.txt" not in str(error)


def test_without_roots_no_file_is_read(fetcher, root):
    assert poison(fetcher(), (root / "large.jpg").as_uri()).code == "uri_not_allowed"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("missing.jpg", "image_not_found"),
        ("large.jpg", "image_too_large"),
        ("large.jpg/a", "image_not_found"),
        ("", "uri_not_allowed"),
        ("pipe", "uri_not_allowed"),
        ("socket", "uri_not_allowed"),
        ("loop", "uri_invalid"),
        ("a" * 300, "uri_invalid"),
        ("a%00b", "uri_invalid"),
        ("a%0Ab", "uri_invalid"),
        ("%ff", "uri_invalid"),
        ("a?b", "uri_invalid"),
        ("a#b", "uri_invalid"),
    ],
)
def test_a_file_that_cannot_be_read_is_poison(fetcher, root, path, code):
    os.mkfifo(root / "pipe")
    os.mknod(root / "socket", stat.S_IFSOCK)
    (root / "loop").symlink_to("loop")

    assert poison(fetcher(policy(file_roots=(root,))), f"file://{root}/{path}").code == code


def test_a_file_of_another_machine_is_refused(fetcher, root):
    assert poison(fetcher(policy(file_roots=(root,))), f"file://server{root}/large.jpg").code == "uri_invalid"


# --- object stores ---


class Buckets:
    """An object store in memory, with the methods of s3fs and gcsfs that are used."""

    def __init__(self, objects: dict[str, bytes | Exception]) -> None:
        self.objects = objects

    def __call__(self, **options: object) -> Buckets:
        assert options["asynchronous"]
        return self

    async def set_session(self) -> Buckets:
        return self

    async def close(self) -> None:
        """No connection is open."""

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        found = self.objects.get(path, FileNotFoundError(path))
        if isinstance(found, Exception):
            raise found
        return found[start:end]


class StoreError(Exception):
    """As the packages of the object stores raise them."""

    __module__ = "botocore.exceptions"


def object_policy(scheme: str = "s3") -> AddressPolicy:
    return policy(schemes=frozenset({"https", scheme}), hosts=("bucket", "*.ours"))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_object_is_read_within_its_bounds(fetcher, scheme):
    refused = PermissionError(SECRET) if scheme == "s3" else OSError(f"Forbidden: {SECRET}")
    store = Buckets({"bucket/a/b c.jpg": b"image", "bucket/large": b"x" * 1001, "bucket/no": refused})
    one = fetcher(object_policy(scheme), store_class=lambda name: store)

    assert one.fetch(f"{scheme}://bucket/a/b c.jpg") == b"image"
    assert poison(one, f"{scheme}://bucket/large").code == "image_too_large"
    assert poison(one, f"{scheme}://bucket/gone?versionId={SECRET}").code == "image_not_found"
    assert poison(one, f"{scheme}://bucket/no").code == "image_forbidden"
    assert poison(one, f"{scheme}://other/a").code == "uri_not_allowed"


@pytest.mark.parametrize("error", [OSError(SECRET), StoreError(SECRET), ConnectionResetError(SECRET)])
def test_an_object_store_that_does_not_answer_is_transient(fetcher, error):
    one = fetcher(object_policy(), store_class=lambda name: Buckets({"bucket/a": error}))

    assert type(error).__name__ in transient(one, "s3://bucket/a")


def test_an_object_store_that_times_out_is_transient(fetcher):
    one = fetcher(object_policy(), store_class=lambda name: Buckets({"bucket/a": TimeoutError(SECRET)}))

    assert "no answer" in transient(one, "s3://bucket/a")


def test_a_bug_in_reading_an_object_is_not_hidden(fetcher):
    one = fetcher(object_policy(), store_class=lambda name: Buckets({"bucket/a": ZeroDivisionError()}))

    with pytest.raises(ZeroDivisionError):
        one.fetch("s3://bucket/a")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_an_allowed_scheme_whose_package_is_missing_refuses_to_start(fetcher, scheme, package):
    def missing(name: str) -> None:
        raise ImportError(name)

    with pytest.raises(Misconfigured, match=rf"{package} .* install the extra {scheme} .*edje-rerank\[{scheme}\]"):
        fetcher(object_policy(scheme), store_class=missing)


def test_the_package_of_a_scheme_that_is_not_allowed_is_not_needed(fetcher):
    fetcher(policy(schemes=frozenset({"https", "file"})), store_class=lambda name: pytest.fail(name))


S3_ERRORS = {
    "denied": (403, "AccessDenied"),
    "gone": (404, "NoSuchKey"),
    "slow": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "key": (403, "InvalidAccessKeyId"),
    "empty": (416, "InvalidRange"),
}


def test_objects_are_read_through_s3fs_from_a_server_that_speaks_s3(serve, fetcher, monkeypatch):
    def fail(status: int, code: str) -> Callable[[Handler], None]:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        return lambda request: request.answer(status, body)

    server = serve()
    server.answers = {f"/bucket/{name}": fail(*error) for name, error in S3_ERRORS.items()}
    server.answers["/bucket/a%20b.jpg"] = lambda request: request.answer(
        206, b"image", Content_Range="bytes 0-4/5", Content_Type="image/jpeg"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url(""))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    one = fetcher(object_policy())

    assert one.fetch("s3://bucket/a b.jpg") == b"image"
    assert one.fetch("s3://bucket/empty") == b""
    assert poison(one, "s3://bucket/denied").code == "image_forbidden"
    assert poison(one, "s3://bucket/gone").code == "image_not_found"
    for name in ("slow", "expired", "key"):
        assert S3_ERRORS[name][1] in transient(one, f"s3://bucket/{name}")
    requests = [path for path, _ in server.seen if path.startswith("/bucket/slow")]
    assert len(requests) <= 2  # the queue of fetches decides when to try again

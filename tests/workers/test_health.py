"""What the probes and the scraper get to see of a worker."""

import contextlib
import http.client
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

import workers.health
from workers.errors import Misconfigured
from workers.health import Health, HealthServer
from workers.metrics import Metrics


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def health():
    return Health(waits_for=["engine warm", "group joined"], stall_limit_s=2.0)


@pytest.fixture
def page(health, clock):
    metrics = Metrics()
    metrics.count_reply("ok", seconds=0.25, num_pairs=100)
    with HealthServer(health, metrics.registry, clock=clock, host="127.0.0.1", port=0) as server:

        def get(path: str) -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        yield get


def test_a_worker_is_ready_when_nothing_is_missing_and_until_it_drains(health, page):
    assert page("/readyz") == (503, "waits for: engine warm\nwaits for: group joined\n")

    health.met("group joined")
    assert page("/readyz") == (503, "waits for: engine warm\n")
    health.met("engine warm")
    assert page("/readyz") == (200, "ready\n")

    health.draining()
    assert page("/readyz") == (503, "draining\n")


def test_a_worker_is_alive_while_its_loop_turns(health, clock, page):
    clock.now += 60
    assert page("/livez") == (200, "alive\n")  # still loading its engine

    health.turned(clock.now)
    clock.now += 2.0
    assert page("/livez") == (200, "alive\n")
    clock.now += 0.5
    assert page("/livez") == (503, "the loop has not turned for 2.5 s; the limit is 2 s\n")
    health.turned(clock.now)
    assert page("/livez") == (200, "alive\n")


def test_an_unknown_condition_is_an_error(health):
    with pytest.raises(KeyError):
        health.met("engine worm")


def test_the_metrics_can_be_scraped(page):
    status, text = page("/metrics?name=x")

    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert status == 200
    assert samples["edje_replies_total", "ok"] == 1
    assert samples["edje_pairs_total",] == 100
    assert samples["edje_reply_seconds_sum",] == 0.25
    assert ("process_resident_memory_bytes",) in samples


def test_another_page_is_named_as_not_there(page):
    assert page("/")[0] == 404


def test_a_taken_port_ends_the_worker_with_a_sentence(health, clock):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(Misconfigured, match=f"127.0.0.1:{port}.*set RERANK_HTTP_PORT to a free port"):
            HealthServer(
                health,
                Metrics().registry,
                clock=clock,
                host="127.0.0.1",
                port=port,
                settings=("RERANK_HTTP_HOST", "RERANK_HTTP_PORT"),
            )


def test_a_part_that_fails_after_the_start_makes_the_worker_unready_until_it_is_restored(health, page):
    health.met("engine warm")
    health.met("group joined")

    health.fail("store_read", "connection refused")
    assert page("/readyz") == (503, "store_read: connection refused\n")
    health.restore("store_read")
    health.restore("store_write")

    assert page("/readyz") == (200, "ready\n")


def test_slow_connections_hold_up_no_probe_and_are_closed(health, page, clock, monkeypatch):
    monkeypatch.setattr(workers.health, "REQUEST_LIMIT_S", 0.2)
    server = HealthServer(health, Metrics().registry, clock=clock, host="127.0.0.1", port=0)
    with server, contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            for _ in range(workers.health.MAX_CONNECTIONS + 8)
        ]
        for connection in slow:
            with contextlib.suppress(OSError):  # the oldest may be closed already
                connection.sendall(b"G")
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/livez", timeout=5) as answer:
            assert answer.read() == b"alive\n"

        assert [is_closed_by_the_server(connection) for connection in slow] == [True] * len(slow)


def is_closed_by_the_server(connection: socket.socket) -> bool:
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_an_invalid_request_does_no_harm(health, clock):
    with HealthServer(health, Metrics().registry, clock=clock, host="127.0.0.1", port=0) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"\x00\xff nonsense\r\n\r\n")
            assert connection.recv(1000)
        asked = http.client.HTTPConnection("127.0.0.1", server.port)
        asked.request("GET", "/livez")

        assert asked.getresponse().read() == b"alive\n"
        assert server.is_serving()
        asked.close()

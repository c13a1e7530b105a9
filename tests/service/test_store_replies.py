"""A store that answers with errors: the workers keep running, report why they are not ready, and go on afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from redis import Redis

from resp_server import RespServer, SmallRedis
from service_harness import SMALL_GIF, Service, reply_in
from service_worker import BUS, eventually, let_pass, waits_for

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services


@pytest.mark.parametrize(
    "reply",
    [b"-upstream failure\r\n", b"-BUSY Redis is busy running a script.\r\n", b"-READONLY You can't write\r\n"],
    ids=["proxy", "busy", "read only"],
)
def test_an_error_reply_for_some_seconds_delays_the_images_and_ends_no_worker(
    make_service: Callable[..., Service], kafka_brokers: str, reply: bytes
):
    fails, small = threading.Event(), SmallRedis()
    with RespServer(lambda command: reply if fails.is_set() else small(command)) as server:
        service = make_service(kafka_brokers, server.url)
        ingest = service.ingest()
        fails.set()
        for number in range(3):
            service.announce(f"img-{number}", data=SMALL_GIF)
        service.flush()
        eventually(lambda: ingest.metric("edje_retries_total", kind="store_read") > 0, "the store is tried again")
        let_pass(1.0)
        fails.clear()

        service.tap(service.topics.images_indexed).wait_ids([f"img-{number}" for number in range(3)])

        assert ingest.is_running
        assert ingest.metric("edje_events_total", outcome="dead_letter") == 0
        assert ingest.stop() == 0


@pytest.mark.parametrize(
    ("kind", "missing"), [("rerank", "-mget"), ("ingest", "-set"), ("rerank", "resetkeys ~other:*")]
)
def test_a_missing_permission_is_reported_before_the_worker_is_ready(
    make_service: Callable[..., Service], kafka_brokers: str, private_redis, kind: str, missing: str
):
    redis = private_redis()
    with Redis(port=redis.port) as admin:
        admin.execute_command(f"ACL SETUSER worker on >pw ~* +@all {missing}")
        service = make_service(kafka_brokers, f"redis://worker:pw@127.0.0.1:{redis.port}")
        worker = service.start(kind)
        eventually(lambda: waits_for(worker, "store answers", *BUS, why="permission"), "the permission is named")

        admin.execute_command("ACL SETUSER worker ~* +@all")
        worker.wait_ready()

        if kind == "rerank":
            service.ask("r-1", ["img"])
            service.flush()
            (record,) = service.replies().wait_ids(["r-1"])["r-1"]
            assert reply_in(record)["missing"] == ["img"]
        assert worker.stop() == 0

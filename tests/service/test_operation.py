"""What an operator uses: a worker's pages, its settings, and its refusals to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from server_process import free_port
from service_harness import SMALL_GIF, Service
from service_worker import BUS, LIMIT_S, ROOT, eventually, waits_for
from workers.read_settings import variable_names
from workers.settings import IngestSettings, RerankSettings

pytest_plugins = ["service_fixtures"]
KINDS = {"rerank": RerankSettings, "ingest": IngestSettings}

#: The series that dashboards and alerts are written against.
EVERY_WORKER = {
    "edje_events_total",
    "edje_commits_total",
    "edje_inflight_events",
    "edje_consumer_lag_events",
    "edje_loop_turns_total",
    "edje_engine_info",
    "process_resident_memory_bytes",
}
RERANK = {
    "edje_replies_total",
    "edje_pairs_total",
    "edje_inflight_pairs",
    "edje_reply_seconds_bucket",
    "edje_queue_wait_seconds_bucket",
    "edje_fetch_seconds_bucket",
    "edje_batch_seconds_bucket",
    "edje_batch_pairs_bucket",
    "edje_batch_tokens_bucket",
    "edje_slab_hits_total",
    "edje_slab_misses_total",
    "edje_slab_evictions_total",
    "edje_slab_slots_used",
    "edje_bad_blobs_total",
    "edje_store_read_bytes_total",
}
INGEST = {
    "edje_image_seconds_bucket",
    "edje_batch_images_bucket",
    "edje_inflight_bytes",
    "edje_store_write_bytes_total",
}


def run(kind: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RERANK_", "INGEST_"))}
    return subprocess.run(
        [sys.executable, "-m", f"workers.{kind}", *arguments],
        cwd=ROOT,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.services
def test_a_worker_is_ready_only_once_its_store_answers_and_reports_what_it_waits_for(
    make_service, kafka_brokers: str, private_redis
):
    redis = private_redis()
    service = make_service(kafka_brokers, redis.url)
    service.store_images(["dog"])
    redis.kill()
    worker = service.start("rerank")

    eventually(lambda: waits_for(worker, "store answers", *BUS, why="Connection refused"), "the store is waited for")
    assert worker.get("/livez") == (200, "alive\n")
    redis.start()
    worker.wait_ready()

    assert worker.get("/readyz") == (200, "ready\n")
    assert worker.get("/nothing")[0] == 404
    assert worker.stop() == 0


@pytest.mark.services
def test_a_worker_waits_for_its_broker_and_a_term_signal_ends_it_meanwhile(make_service, kafka_brokers, redis_url):
    service = make_service(kafka_brokers, redis_url)
    service.brokers = f"127.0.0.1:{free_port()}"
    worker = service.start("rerank")
    eventually(lambda: waits_for(worker, *BUS), "the broker is waited for")

    worker.terminate()

    assert worker.wait(20) == 0


@pytest.mark.services
def test_the_promised_series_are_there_and_move(service: Service):
    service.store_images(["dog", "cat"])
    rerank, ingest = service.start("rerank"), service.start("ingest")
    service.ask("r-1", ["dog", "cat", "none"])
    service.announce("point", data=SMALL_GIF)
    service.flush()
    service.replies().wait_ids(["r-1"])
    service.tap(service.topics.images_indexed).wait_ids(["point"])

    for worker, topic in ((rerank, service.topics.rerank_requests), (ingest, service.topics.images_new)):
        eventually(lambda worker=worker: worker.metric("edje_commits_total") > 0, "the offset is committed")
        for partition in ("0", "1"):
            lag = ("edje_consumer_lag_events", frozenset({("topic", topic), ("partition", partition)}))
            eventually(lambda worker=worker, lag=lag: worker.metrics().get(lag) == 0, "there is no lag")
    eventually(lambda: rerank.metric("edje_slab_slots_used") == 2, "the gauges are brought up to date")

    assert {name for name, _ in rerank.metrics()} >= EVERY_WORKER | RERANK
    assert {name for name, _ in ingest.metrics()} >= EVERY_WORKER | INGEST
    assert rerank.metric("edje_replies_total", status="partial") == 1
    assert rerank.metric("edje_pairs_total") == 3
    assert ingest.metric("edje_store_write_bytes_total") == service.checkpoint.layout.blob_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_show_config_lists_every_setting_with_its_source_and_without_secrets(kind: str):
    url = "rediss://reader:hunter2@store.example:6380/1"

    shown = run(kind, "--show-config", "json", REDIS_URL=url, **{f"{kind.upper()}_TOPIC_PREFIX": "team-a."})

    rows = {row["name"]: row for row in json.loads(shown.stdout)}
    assert set(rows) == set(variable_names(KINDS[kind]).values())
    assert all(row["meaning"] for row in rows.values())
    assert rows[f"{kind.upper()}_TOPIC_PREFIX"]["value"] == "team-a."
    assert (rows["REDIS_URL"]["source"], rows["KAFKA_BROKERS"]["source"]) == ("environment", "default")
    assert "hunter2" not in shown.stdout + shown.stderr
    assert shown.returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_setting_refuses_to_start_and_the_right_name_is_suggested(kind: str):
    refused = run(kind, **{f"{kind.upper()}_TOPIC_PREFIXX": "a."})

    assert refused.returncode == 2
    assert f"did you mean {kind.upper()}_TOPIC_PREFIX?" in refused.stderr


def test_a_missing_checkpoint_ends_the_worker_with_one_line(tmp_path):
    ended = run("rerank", RERANK_CHECKPOINT=str(tmp_path / "none"), RERANK_HTTP_PORT="0")

    assert ended.returncode == 1
    assert str(tmp_path / "none") in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr

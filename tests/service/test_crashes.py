"""Workers are killed in the middle of a batch: after a restart every event has its outcome, none is lost."""

from __future__ import annotations

import pytest

from service_harness import SMALL_GIF, Service, reply_in
from service_worker import eventually

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services

IMAGES = ["dog", "cat", "cow", "owl"]


def test_a_rerank_worker_killed_in_the_middle_of_a_batch_leaves_no_request_unanswered(service: Service):
    service.store_images(IMAGES)
    # The first batch answers 32 requests and is committed at once; the next commit would come a minute later.
    settings = {"constant_engine_ms_per_item": 10, "max_batch_pairs": 128, "commit_interval_ms": 60_000}
    worker = service.rerank(**settings)
    ids = [f"r-{number}" for number in range(80)]
    for request_id in ids:
        service.ask(request_id, IMAGES)
    service.flush()
    replies = service.replies()
    replies.wait_for(33)

    assert len(replies.pull()) < len(ids)
    worker.kill()
    service.rerank(**settings)
    answered = replies.wait_ids(ids)

    contents = {i: [(r["status"], r["results"], r["model"]) for r in map(reply_in, answered[i])] for i in ids}
    assert all(content == repeats[0] for repeats in contents.values() for content in repeats)
    assert {repeats[0][0] for repeats in contents.values()} == {"ok"}
    assert any(len(repeats) > 1 for repeats in contents.values())  # published but not committed answers are repeated


def test_an_ingest_worker_killed_in_the_middle_of_a_batch_leaves_no_image_unindexed(service: Service):
    settings = {"constant_engine_ms_per_item": 50, "max_batch_images": 8}
    worker = service.ingest(**settings)
    images = [f"image-{number}" for number in range(60)]
    for image in images:
        service.announce(image, data=SMALL_GIF)
    service.flush()
    indexed = service.tap(service.topics.images_indexed)
    indexed.wait_for(1)

    assert len(indexed.pull()) < len(images)
    worker.kill()
    service.rerank()
    service.ingest(**settings)
    found = indexed.wait_ids(images)

    assert set(found) == set(images)
    service.ask("all", images)
    service.flush()
    assert reply_in(service.replies().wait_ids(["all"])["all"][0])["missing"] == []


def test_a_kill_in_the_middle_of_a_transaction_leaves_exactly_one_reply_to_each_request(
    make_service, private_kafka, redis_url
):
    kafka = private_kafka(
        {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "500", "group.min.session.timeout.ms": "1000"}
    )
    service = make_service(kafka.brokers, redis_url)
    service.store_images(IMAGES)
    settings = {
        "delivery": "exactly_once",
        "constant_engine_ms_per_item": 2,
        "transaction_interval_ms": 5,
        "session_timeout_ms": 2_000,
    }
    ids = [f"r-{number}" for number in range(300)]
    for request_id in ids:
        service.ask(request_id, IMAGES)
    service.flush()
    replies, everything = service.replies(), service.tap(service.topics.rerank_responses, read_committed=False)

    for seen in (50, 150):
        worker = service.rerank(**settings)
        eventually(lambda seen=seen: len(everything.pull()) >= seen, f"{seen} replies")
        worker.kill()
    service.rerank(**settings)
    answered = replies.wait_ids(ids)

    assert {request_id: len(records) for request_id, records in answered.items()} == dict.fromkeys(ids, 1)
    assert len(answered) == len(ids)

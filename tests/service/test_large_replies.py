"""An error reply replaces a reply that is too large for the broker, and no other reply is lost."""

from __future__ import annotations

import pytest
from kafka import KafkaAdminClient

from service_harness import Service, reply_in

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services

MODES = ["at_least_once", "exactly_once"]
IMAGES = [f"image-with-a-rather-long-name-{number:04d}" for number in range(100)]


def ask_for_small_and_large_replies(service: Service) -> list[str]:
    for number in range(3):
        service.ask(f"small-{number}", IMAGES, top_n=1)
        service.ask(f"large-{number}", IMAGES)
    service.flush()
    return [f"{size}-{number}" for size in ("small", "large") for number in range(3)]


def check(replies: dict) -> None:
    for request_id, records in replies.items():
        (reply,) = map(reply_in, records)
        if request_id.startswith("small"):
            assert (reply["status"], len(reply["results"])) == ("ok", 1)
        else:
            assert (reply["status"], reply["error"]["code"]) == ("error", "reply_too_large")
            assert "top_n" in reply["error"]["message"]


@pytest.mark.parametrize("delivery", MODES)
def test_a_reply_over_the_workers_own_limit_is_answered_with_an_error(service: Service, delivery: str):
    service.store_images(IMAGES)
    service.rerank(delivery=delivery, max_message_bytes=4_000)

    ids = ask_for_small_and_large_replies(service)

    check(service.replies().wait_ids(ids))


@pytest.mark.parametrize("delivery", MODES)
def test_a_reply_over_the_limit_of_its_topic_is_answered_with_an_error(
    make_service, kafka_brokers: str, redis_url: str, delivery: str
):
    service = make_service(kafka_brokers, redis_url)
    service.store_images(IMAGES)
    admin = KafkaAdminClient(bootstrap_servers=kafka_brokers.split(","))
    small_topic = f"{service.topics.rerank_responses}.small"
    admin.create_topics(
        {small_topic: {"num_partitions": 1, "configs": {"max.message.bytes": "4000"}}}, wait_for_metadata=True
    )
    admin.close()
    service.rerank(delivery=delivery)
    for number in range(3):
        service.ask(f"small-{number}", IMAGES, top_n=1, reply_topic=small_topic)
        service.ask(f"large-{number}", IMAGES, reply_topic=small_topic)
        service.ask(f"elsewhere-{number}", IMAGES)
    service.flush()

    replies = service.tap(small_topic).wait_ids([f"{s}-{n}" for s in ("small", "large") for n in range(3)])
    elsewhere = service.replies().wait_ids([f"elsewhere-{number}" for number in range(3)])

    check(replies)
    assert {reply_in(record)["status"] for records in elsewhere.values() for record in records} == {"ok"}

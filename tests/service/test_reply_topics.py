"""Requests whose reply topic does not exist, on a Kafka that creates no topics automatically."""

from __future__ import annotations

import pytest

from service_harness import reply_in

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_requests_whose_reply_topic_does_not_exist_get_an_error_and_the_others_an_answer(
    make_service, private_kafka, redis_url: str, delivery: str
):
    server = private_kafka({"auto.create.topics.enable": "false"})
    service = make_service(server.brokers, redis_url)
    service.store_images(["dog"])
    worker = service.rerank(delivery=delivery)

    for number in range(3):
        nowhere = f"{service.topics.rerank_responses}.nowhere{number}"
        service.ask(f"lost-{number}", ["dog"], reply_topic=nowhere)
        service.ask(f"refused-{number}", ["dog"], reply_topic=nowhere, model="0" * 16)
        service.ask(f"good-{number}", ["dog"])
    service.flush()
    kinds = ("lost", "refused", "good")
    replies = service.replies().wait_ids([f"{kind}-{number}" for kind in kinds for number in range(3)])

    for number in range(3):
        assert reply_in(replies[f"good-{number}"][0])["status"] == "ok"
        for kind in ("lost", "refused"):
            error = reply_in(replies[f"{kind}-{number}"][0])["error"]
            assert error["code"] == "reply_topic_refused"
            assert error["message"] == f"the topic {service.topics.rerank_responses}.nowhere{number} does not exist"
    assert worker.metric("edje_replies_replaced_total") == 6
    assert worker.stop() == 0

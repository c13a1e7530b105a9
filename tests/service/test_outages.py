"""Kafka or Redis freezes, dies and comes back: nothing is lost, and requests with a deadline are answered in time.

EDJE_AWAY_S is the number of seconds of an outage.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta

import pytest

from service_harness import SMALL_GIF, Service, reply_in
from service_worker import eventually, let_pass

pytest_plugins = ["service_fixtures"]
AWAY_S = float(os.environ.get("EDJE_AWAY_S", "5"))
pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(180 + 4 * AWAY_S),
    # kafka-python leaves the socket of a refused connection to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

IMAGES = ["dog", "cat", "cow"]
#: How long a one-node broker takes to recover on a busy machine.
BACK_S = 60.0


def ask_many(service: Service, name: str, number: int = 20) -> list[str]:
    ids = [f"{name}-{count}" for count in range(number)]
    for request_id in ids:
        service.ask(request_id, IMAGES)
    service.flush()
    return ids


def in_s(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_with_redis_away_requests_wait_unless_their_deadline_passes(make_service, kafka_brokers, private_redis, how):
    redis = private_redis()
    service = make_service(kafka_brokers, redis.url)
    service.store_images(IMAGES)
    worker = service.rerank()
    replies = service.replies()

    redis.freeze() if how == "frozen" else redis.kill()
    waiting = ask_many(service, "patient")
    deadline_s = min(2.0, AWAY_S / 2)
    due = time.monotonic() + deadline_s
    service.ask("hurried", IMAGES, deadline=in_s(deadline_s))
    service.flush()
    answered = replies.wait_ids(["hurried"])
    late_s = time.monotonic() - due
    let_pass(max(0.0, AWAY_S - deadline_s))
    assert set(answered) == {"hurried"}
    redis.thaw() if how == "frozen" else redis.start()
    answered = replies.wait_ids(waiting)

    assert reply_in(answered["hurried"][0])["status"] == "expired"
    assert late_s < 1.5
    assert [reply_in(answered[request_id][0])["status"] for request_id in waiting] == ["ok"] * len(waiting)
    assert max(map(len, answered.values())) == 1
    assert worker.metric("edje_retries_total", kind="store_read") > 0
    assert worker.get("/livez")[0] == 200


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_with_the_broker_killed_and_back_nothing_is_lost_and_work_resumes(
    make_service, private_kafka, redis_url, delivery
):
    # Not one that looks for dead transactions more often than by default: a Kafka 4.4 that aborts one while it starts
    # treats its partitions as deleted and does not abort there, so the next transaction commits the old messages.
    kafka = private_kafka()
    service = make_service(kafka.brokers, redis_url)
    service.store_images(IMAGES)
    settings = {"delivery": delivery, "constant_engine_ms_per_item": 5}
    worker = service.rerank(**settings)
    replies = service.replies()
    replies.wait_ids(ask_many(service, "before", 3))

    ids = ask_many(service, "meanwhile", 100)  # 1.5 s of work: some is answered, some is not
    replies.wait_ids(ids[:1])
    kafka.kill()
    let_pass(AWAY_S)
    kafka.start()
    back = time.monotonic()
    ids += ask_many(service, "after", 5)

    def all_answered():
        replies.pull()
        return set(ids) <= set(replies.by_id())

    eventually(all_answered, "every message has its answer", BACK_S)
    answered = replies.by_id()
    print(f"{delivery}: all answered {time.monotonic() - back:.1f} s after the broker was back")

    assert {reply_in(record)["status"] for records in answered.values() for record in records} == {"ok"}
    if delivery == "exactly_once":
        assert max(map(len, answered.values())) == 1
    for records in answered.values():
        assert len({str(reply_in(record)["results"]) for record in records}) == 1
    eventually(lambda: worker.get("/livez")[0] == 200, "alive")
    assert worker.stop() == 0


def test_with_redis_away_images_wait_and_are_indexed_when_it_is_back(make_service, kafka_brokers, private_redis):
    redis = private_redis()
    service = make_service(kafka_brokers, redis.url)
    worker = service.ingest()
    redis.kill()
    images = [f"image-{number}" for number in range(10)]

    for image in images:
        service.announce(image, data=SMALL_GIF)
    service.flush()
    eventually(
        lambda: worker.metric("edje_retries_total", kind="store_read") > 0, "the worker has noticed that Redis is away"
    )
    eventually(lambda: "Connection refused" in worker.get("/readyz")[1], "the worker is not ready and reports why")
    let_pass(AWAY_S)
    redis.start()
    indexed = service.tap(service.topics.images_indexed).wait_ids(images)
    eventually(lambda: worker.get("/readyz")[0] == 200, "the worker is ready again")

    assert [len(indexed[image]) for image in images] == [1] * len(images)
    assert worker.metric("edje_events_total", outcome="ok") == len(images)

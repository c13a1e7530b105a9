"""Workers that drain: each request that they have taken is answered once, and the other workers answer the rest."""

from __future__ import annotations

import time

import pytest

from service_harness import Service, reply_in
from service_worker import eventually

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services

IMAGES = ["dog", "cat", "cow", "owl"]
MODES = ["at_least_once", "exactly_once"]
#: A small limit of work, so that most requests are still in the topic when a worker leaves.
SETTINGS = {"max_inflight_pairs": 128, "max_batch_pairs": 128, "max_candidates": 100, "session_timeout_ms": 30_000}


def ask_many(service: Service, number: int, start: int = 0) -> list[str]:
    ids = [f"r-{count}" for count in range(start, start + number)]
    for request_id in ids:
        service.ask(request_id, IMAGES)
    service.flush()
    return ids


@pytest.mark.parametrize("delivery", MODES)
def test_a_worker_drains_after_sigterm_and_the_next_one_continues_at_once(service: Service, delivery: str):
    service.store_images(IMAGES)
    settings = SETTINGS | {"delivery": delivery, "constant_engine_ms_per_item": 3}
    first = service.rerank(**settings)
    replies = service.replies()
    ids = ask_many(service, 400)  # 4.8 s of work
    replies.wait_for(20)

    first.terminate()
    status = first.wait()
    num_answered = len(replies.pull())
    second = service.start("rerank", **settings).wait_ready()
    ready = time.monotonic()
    replies.wait_for(num_answered + 1)
    took_over_s = time.monotonic() - ready
    answered = replies.wait_ids(ids)

    assert status == 0
    assert num_answered < len(ids)
    assert {request_id: len(records) for request_id, records in answered.items()} == dict.fromkeys(ids, 1)
    assert took_over_s < 5
    assert "drained" in first.log.read_text()
    assert second.stop() == 0


@pytest.mark.parametrize("delivery", MODES)
def test_workers_that_join_and_leave_in_mid_stream_lose_nothing_and_answer_once(service: Service, delivery: str):
    service.store_images(IMAGES)
    settings = SETTINGS | {"delivery": delivery, "constant_engine_ms_per_item": 2}
    service.rerank(**settings)
    replies = service.replies()
    ids = ask_many(service, 500)
    replies.wait_for(20)

    def second_has_its_share() -> bool:
        if len(ids) - len(replies.pull()) < 250:  # 2 s of work for one
            ids.extend(ask_many(service, 250, start=len(ids)))
        return second.metric("edje_events_total", outcome="ok") >= 50

    second = service.start("rerank", **settings)
    eventually(second_has_its_share, "the second worker has its share")
    assert second.stop() == 0
    answered = replies.wait_ids(ids)

    num_repeated = sum(len(records) - 1 for records in answered.values())
    print(f"{delivery}: {num_repeated} of {len(ids)} repeated")
    assert {reply_in(record)["status"] for records in answered.values() for record in records} == {"ok"}
    assert num_repeated == 0

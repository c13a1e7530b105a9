"""A rolling update under load, as the Deployment does it: a new worker is ready, then an old one gets SIGTERM."""

from __future__ import annotations

import pytest

from service_harness import Service, reply_in
from service_worker import Worker, eventually

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services

IMAGES = ["dog", "cat", "cow", "owl"]
SETTINGS = {"constant_engine_ms_per_item": 2, "max_inflight_pairs": 128, "max_batch_pairs": 128, "max_candidates": 100}
#: Requests that are always waiting in the topic: half a second of work for two workers.
WAITING = 100


class Load:
    """A steady load: for each answered request another one is published."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.replies = service.replies()
        self.ids: list[str] = []

    def flows(self) -> None:
        num_waiting = len(self.ids) - len(self.replies.pull())
        for _ in range(WAITING - num_waiting):
            self.ids.append(f"r-{len(self.ids)}")
            self._service.ask(self.ids[-1], IMAGES)
        self._service.flush()

    def flows_until(self, condition, what: str) -> None:
        def holds() -> bool:
            self.flows()
            return condition()

        eventually(holds, what)

    def flows_for(self, num_replies: int) -> None:
        goal = len(self.replies.records) + num_replies
        self.flows_until(lambda: len(self.replies.records) >= goal, f"{num_replies} more replies")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_a_rolling_update_of_two_workers_under_load_loses_and_fails_no_request(service: Service, delivery: str):
    service.store_images(IMAGES)
    settings = SETTINGS | {"delivery": delivery}
    old = [service.start("rerank", **settings), service.start("rerank", **settings)]
    for worker in old:
        worker.wait_ready()
    load = Load(service)
    load.flows_for(WAITING)

    new: list[Worker] = []
    for leaving in old:
        arriving = service.start("rerank", **settings)
        load.flows_until(lambda worker=arriving: worker.get("/readyz")[0] == 200, "the new worker is ready")
        leaving.terminate()
        load.flows_until(lambda worker=leaving: not worker.is_running, "the old worker has ended")
        assert leaving.wait() == 0
        new.append(arriving)
    load.flows_for(2 * WAITING)
    answered = load.replies.wait_ids(load.ids)

    assert {reply_in(record)["status"] for records in answered.values() for record in records} == {"ok"}
    assert {request_id for request_id, records in answered.items() if len(records) != 1} == set()
    assert all(worker.metric("edje_events_total", outcome="ok") > 0 for worker in new)
    assert [worker.stop() for worker in new] == [0, 0]

"""A request that crashes the process is found by the next workers, and every other request is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

import crashing_rerank
from service_harness import reply_in
from service_worker import eventually

pytest_plugins = ["service_fixtures"]
pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

#: Two workers die with other requests in work, one dies with the request alone, and one goes on.
LIVES = 4


@pytest.mark.parametrize(
    ("killer", "delivery"), [("os._exit", "at_least_once"), ("SIGSEGV", "exactly_once")], ids=["exit", "segfault"]
)
def test_the_request_that_kills_is_dead_lettered_by_the_fourth_life_and_the_others_are_answered(
    service, killer, delivery
):
    service.program = [str(Path(crashing_rerank.__file__))]
    service.variables["PYTHONPATH"] = str(Path.cwd())
    replies, letters = service.replies(), service.dead_letters(service.topics.rerank_requests)
    for number in range(12):
        text = f"kill by {killer}" if number == 7 else "a dog"
        service.ask(f"r-{number}", ["dog"], text=text)
    service.flush()

    for _ in range(LIVES - 1):
        worker = service.start("rerank", delivery=delivery)
        eventually(lambda worker=worker: not worker.is_running, "the worker has died", 90)
    last = service.start("rerank", delivery=delivery).wait_ready()
    service.ask("after", ["dog"])
    service.flush()

    wanted = {f"r-{number}" for number in range(12)} | {"after"}
    answered = replies.wait_ids(wanted)
    (letter,) = letters.wait_for(1)
    cause = dict(letter.headers)
    assert (letter.key, cause["dead-letter-error-code"]) == (b"r-7", b"worker_died")
    assert reply_in(answered["r-7"][0])["error"]["code"] == "worker_died"
    assert last.is_running
    if delivery == "exactly_once":
        assert {len(of_id) for of_id in answered.values()} == {1}

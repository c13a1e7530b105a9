"""Kills workers at random and restarts Redis under a stream of requests, and counts what comes back.

Shared by the end-to-end tests and `benchmarks/soak.py`, which check the result.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from service_harness import Service, reply_in
from service_worker import Worker, eventually

#: So that a broker takes short session timeouts, and looks for dead transactions often.
BROKER = {
    "group.min.session.timeout.ms": "1000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
}
IMAGES = ["dog", "cat", "cow", "owl", "fox", "bee"]
CANDIDATES = 4
#: Requests published at once; the next ones follow when most of these are answered.
WAVE = 250
#: For what is still open when the killing has ended: a dead worker's partitions and transaction are waited for.
SETTLE_S = 90.0


class Restartable:
    """A server that the run stops and starts again: Redis."""

    def __init__(self, stop: Callable[[], None], start: Callable[[], None]) -> None:
        self.stop, self.start = stop, start


@dataclass(frozen=True, slots=True)
class Chaos:
    """The faults of a run, and the replies that users saw."""

    requests: int
    lost: int
    duplicates: int  # replies beyond the first, as a reader of committed messages sees them
    different: int  # requests whose replies differ
    statuses: dict[str, int]
    kills: int
    drains: int
    redis_restarts: int
    seconds: float


def run_chaos(
    service: Service,
    redis: Restartable,
    *,
    requests: int,
    kills: int,
    drains: int,
    num_workers: int = 2,
    seed: int = 0,
    **settings: object,
) -> Chaos:
    """Publish requests in waves; kill, drain and replace workers at random moments of the stream meanwhile."""
    chance, started = random.Random(seed), time.monotonic()
    service.store_images(IMAGES)
    workers = [service.start("rerank", **settings) for _ in range(num_workers)]
    for worker in workers:
        worker.wait_ready()
    replies = service.replies()
    ids = [f"r-{number:06d}" for number in range(requests)]
    # What happens once so many requests are answered; each shares out the stream evenly, at a random place.
    events = ["kill"] * kills + ["drain"] * drains + ["redis"]
    chance.shuffle(events)
    share = requests * 0.8 / len(events)
    due = [(int(share * (number + chance.random())), event) for number, event in enumerate(events)]
    answered: set[bytes | None] = set()
    num_read = num_published = 0

    def progress() -> int:
        nonlocal num_read, num_published
        records = replies.pull()
        answered.update(record.key for record in records[num_read:])
        num_read = len(records)
        if num_published < requests and num_published - len(answered) < WAVE:
            for request_id in ids[num_published : num_published + WAVE]:
                service.ask(request_id, chance.sample(IMAGES, CANDIDATES))
            num_published = min(requests, num_published + WAVE)
            service.flush()
        return len(answered)

    for moment, event in due:
        eventually(lambda moment=moment: progress() >= moment, f"{moment} requests answered before {event}", SETTLE_S)
        if event == "redis":
            redis.stop()
            redis.start()
        else:
            workers.append(end_one(workers.pop(chance.randrange(len(workers))), event, service, settings))
    for worker in workers:
        worker.wait_ready()
    eventually(lambda: progress() == requests, f"{requests} requests answered", SETTLE_S)
    for worker in workers:
        worker.stop()
    progress()
    return result(service, ids, replies.by_id(), kills, drains, time.monotonic() - started)


def end_one(worker: Worker, how: str, service: Service, settings: dict[str, object]) -> Worker:
    """End a worker and start its successor without waiting for it."""
    if how == "kill":
        worker.kill()
    else:
        worker.wait_ready()  # before it is, a signal ends it without a drain
        assert worker.stop() == 0
    return service.start("rerank", **settings)


def result(service: Service, ids: list[str], by_id: dict, kills: int, drains: int, seconds: float) -> Chaos:
    statuses = Counter(reply_in(records[0])["status"] for records in by_id.values())
    different = sum(len({str(reply_in(record)["results"]) for record in records}) > 1 for records in by_id.values())
    return Chaos(
        requests=len(ids),
        lost=len(set(ids) - by_id.keys()),
        duplicates=sum(len(records) - 1 for records in by_id.values()),
        different=different,
        statuses=dict(statuses),
        kills=kills,
        drains=drains,
        redis_restarts=1,
        seconds=round(seconds, 1),
    )

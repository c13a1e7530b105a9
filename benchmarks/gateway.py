"""Measures the latency that HTTP adds, and loads the gateway while parts of the service are killed.

Run: python benchmarks/gateway.py [--requests 300] [--rate 200 --seconds 300]

The latency compares the Kafka client with the gateway, one request at a time, in turn. Under load every call must be
answered within its timeout with a ranking of its documents, although a rerank worker and a gateway replica are
killed and Redis is restarted. The last line of output is one JSON document; exits with 1 if a call fails.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import aiohttp
import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy" / "local"), str(ROOT / "tests" / "support")]

from protocols.events import Candidate, Query, RerankRequest  # noqa: E402
from server_process import free_port  # noqa: E402
from service_chaos import BROKER  # noqa: E402
from service_harness import Checkpoint, Service  # noqa: E402
from service_worker import Worker  # noqa: E402
from services import KafkaServer, RedisServer  # noqa: E402
from workers.client import connect  # noqa: E402

NUM_IMAGES, CANDIDATES, WARM_UP = 2_000, 100, 30
TIMEOUT_MS = 5_000
IMAGES = [f"img-{number:06d}" for number in range(NUM_IMAGES)]


def candidates_of(number: int) -> list[str]:
    start = number * 37 % (NUM_IMAGES - CANDIDATES)
    return IMAGES[start : start + CANDIDATES]


class Replicas:
    """Gateway replicas behind one client, which tries another one when a connection fails, as a load balancer does."""

    def __init__(self, service: Service, number: int) -> None:
        self._service = service
        self.ports = [free_port() for _ in range(number)]
        self.workers = [self._start(index) for index in range(number)]

    def _start(self, index: int) -> Worker:
        return self._service.start_plain(
            "gateway", search=False, port=self.ports[index], reply_partition=index % 2, timeout_ms=TIMEOUT_MS
        )

    def kill_and_replace(self, index: int) -> None:
        self.workers[index].kill()
        self.workers[index] = self._start(index)

    async def rerank(self, session: aiohttp.ClientSession, number: int) -> tuple[str, float]:
        """Make one call; returns its outcome and the seconds it took."""
        body = {"query": "a dog on a beach", "documents": candidates_of(number), "return_documents": True}
        started_at = time.perf_counter()
        for attempt in range(len(self.ports)):
            url = f"http://127.0.0.1:{self.ports[(number + attempt) % len(self.ports)]}/v2/rerank"
            try:
                async with session.post(url, json=body) as answer:
                    outcome = judged(number, answer.status, await answer.json())
                    break
            except (aiohttp.ClientError, TimeoutError):
                outcome = "unreachable"
        return outcome, time.perf_counter() - started_at


def judged(number: int, status: int, body: dict) -> str:
    """Return "ok" if the answer ranks the call's documents, else the fault."""
    if status != 200:
        return f"status {status}"
    if sorted(result["document"]["text"] for result in body["results"]) != candidates_of(number):
        return "another's answer"
    return f"degraded: {body['degraded']}" if "degraded" in body else "ok"


def measure_latency(service: Service, replicas: Replicas, num_requests: int) -> dict[str, float]:
    """Return the medians of both ways in milliseconds, measured in turn."""
    kafka_s: list[float] = []
    http_s: list[float] = []

    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            for number in range(num_requests + WARM_UP):
                request = RerankRequest(
                    request_id=f"bench-{number}",
                    query=Query(text="a dog on a beach"),
                    candidates=[Candidate(image_id=name) for name in candidates_of(number)],
                )
                started_at = time.perf_counter()
                client.rerank(request, timeout_s=20)
                took_s = time.perf_counter() - started_at
                outcome, http_took_s = await replicas.rerank(session, number)
                assert outcome == "ok", outcome
                if number >= WARM_UP:
                    kafka_s.append(took_s)
                    http_s.append(http_took_s)

    connection = {"bootstrap_servers": service.brokers.split(",")}
    with connect(connection, service.topics, read=[service.topics.rerank_responses]) as client:
        asyncio.run(run())
    kafka_ms, http_ms = (1000 * statistics.median(each) for each in (kafka_s, http_s))
    return {"kafka_ms": round(kafka_ms, 2), "http_ms": round(http_ms, 2), "added_ms": round(http_ms - kafka_ms, 2)}


async def load(service: Service, replicas: Replicas, redis: RedisServer, rate: float, seconds: float) -> dict:
    """Send calls at a rate while parts are killed; returns outcomes and latencies."""
    outcomes: Counter[str] = Counter()
    took_s: list[float] = []
    events = [
        (seconds * 0.25, lambda: kill_rerank(service)),
        (seconds * 0.5, lambda: replicas.kill_and_replace(0)),
        (seconds * 0.75, lambda: (redis.kill(), redis.start())),
    ]

    async def call(session: aiohttp.ClientSession, number: int) -> None:
        outcome, seconds_taken = await replicas.rerank(session, number)
        outcomes[outcome] += 1
        took_s.append(seconds_taken)

    timeout = aiohttp.ClientTimeout(total=2 * TIMEOUT_MS / 1000)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began, calls = time.perf_counter(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            while events and time.perf_counter() - began >= events[0][0]:
                await asyncio.to_thread(events.pop(0)[1])
            calls.append(asyncio.create_task(call(session, number)))
        await asyncio.gather(*calls)
    took_s.sort()
    return {
        "calls": len(took_s),
        "outcomes": dict(outcomes),
        "p50_ms": round(1000 * took_s[len(took_s) // 2], 1),
        "p99_ms": round(1000 * took_s[int(len(took_s) * 0.99)], 1),
        "longest_ms": round(1000 * took_s[-1], 1),
    }


def kill_rerank(service: Service) -> None:
    next(worker for worker in service.workers if worker.kind == "rerank").kill()
    service.start("rerank", session_timeout_ms=3_000)


def main(
    requests: Annotated[int, typer.Option(help="Requests of the latency comparison.")] = 300,
    rate: Annotated[float, typer.Option(help="Calls per second under load; 0: no load test.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Length of the load test.")] = 60.0,
) -> None:
    """Run two gateway replicas and two rerank workers with the constant engine against private servers."""
    with tempfile.TemporaryDirectory(prefix="edje-gateway-") as name:
        folder = Path(name)
        kafka, redis = KafkaServer(folder / "kafka", BROKER), RedisServer(folder / "redis")
        kafka.start()
        redis.start()
        service = Service(kafka.brokers, redis.url, "bench.", Checkpoint.make(folder / "checkpoint"), folder / "logs")
        try:
            service.create_topics(num_partitions=4)
            service.store_images(IMAGES)
            started = [service.start("rerank", session_timeout_ms=3_000) for _ in range(2)]
            replicas = Replicas(service, 2)
            for worker in (*started, *replicas.workers):
                worker.wait_ready()
            report: dict = {"latency": measure_latency(service, replicas, requests)}
            if rate:
                report["load"] = asyncio.run(load(service, replicas, redis, rate, seconds))
        finally:
            service.close()
            redis.stop()
            kafka.stop()
    print(json.dumps(report))
    outcomes = report.get("load", {}).get("outcomes", {})
    if any(name != "ok" and not name.startswith("degraded") for name in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

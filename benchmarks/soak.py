"""Sends many requests while workers are killed and replaced at random and Redis restarts once.

Run: python benchmarks/soak.py [--requests 10000] [--delivery exactly_once]

Exits with 1 if a request is lost, answered in two ways or, with exactly_once, answered twice. The last line of output
is one JSON document.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "deploy" / "local"), str(ROOT / "tests" / "support")]

from service_chaos import BROKER, Restartable, run_chaos  # noqa: E402
from service_harness import Checkpoint, Service  # noqa: E402
from services import KafkaServer, RedisServer  # noqa: E402


def main(
    requests: Annotated[int, typer.Option(help="Requests to publish.")] = 10_000,
    delivery: Annotated[str, typer.Option(help="at_least_once or exactly_once.")] = "exactly_once",
    kills: Annotated[int, typer.Option(help="Workers killed with SIGKILL and replaced.")] = 10,
    drains: Annotated[int, typer.Option(help="Workers stopped with SIGTERM and replaced.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the times and the workers chosen.")] = 0,
) -> None:
    """Run two workers with the constant engine against private servers; each request has four candidates."""
    with tempfile.TemporaryDirectory(prefix="edje-soak-") as name:
        folder = Path(name)
        kafka, redis = KafkaServer(folder / "kafka", BROKER), RedisServer(folder / "redis")
        kafka.start()
        redis.start()
        service = Service(kafka.brokers, redis.url, "soak.", Checkpoint.make(folder / "checkpoint"), folder / "logs")
        try:
            service.create_topics(num_partitions=4)
            counts = run_chaos(
                service,
                Restartable(redis.kill, redis.start),
                requests=requests,
                kills=kills,
                drains=drains,
                seed=seed,
                delivery=delivery,
                session_timeout_ms=3_000,
            )
        finally:
            service.close()
            redis.stop()
            kafka.stop()
    print(json.dumps({"delivery": delivery, **asdict(counts)}))
    if counts.lost or counts.different or (delivery == "exactly_once" and counts.duplicates):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

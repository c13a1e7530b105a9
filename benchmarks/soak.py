"""The long run: many requests while workers are killed and replaced at random and Redis restarts once.

    python benchmarks/soak.py --requests 10000 --delivery exactly_once

Exits with 1 if a request is lost, answered in two ways, or, with exactly_once, answered twice. The last line is JSON.
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
sys.path[:0] = [str(ROOT), str(ROOT / "deploy" / "local"), str(ROOT / "tests")]

from service_chaos import BROKER, Restartable, run_chaos  # noqa: E402
from service_harness import Checkpoint, Service  # noqa: E402
from services import KafkaServer, RedisServer  # noqa: E402


def main(
    requests: Annotated[int, typer.Option(help="Requests to publish.")] = 10_000,
    delivery: Annotated[str, typer.Option(help="at_least_once or exactly_once.")] = "exactly_once",
    kills: Annotated[int, typer.Option(help="Workers killed (-9) and replaced.")] = 10,
    drains: Annotated[int, typer.Option(help="Workers told to end (-15) and replaced.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the moments and the victims.")] = 0,
) -> None:
    """Servers of its own, two workers over the constant engine, four candidates in each request."""
    with tempfile.TemporaryDirectory(prefix="edje-soak-") as name:
        folder = Path(name)
        kafka, redis = KafkaServer(folder / "kafka", BROKER), RedisServer(folder / "redis")
        kafka.start()
        redis.start()
        service = Service(kafka.brokers, redis.url, "soak.", Checkpoint.make(folder / "checkpoint"), folder / "logs")
        try:
            service.create_topics(num_partitions=4)
            seen = run_chaos(
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
    print(json.dumps({"delivery": delivery, **asdict(seen)}))
    if seen.lost or seen.different or (delivery == "exactly_once" and seen.duplicates):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""A stream of requests while workers die and Redis restarts: all are answered, with exactly_once only once.

The long run is `python benchmarks/soak.py`.
"""

from __future__ import annotations

import pytest

from service_chaos import BROKER, Restartable, run_chaos

pytest_plugins = ["service_fixtures"]
pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

REQUESTS = 1_000


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_a_thousand_requests_are_answered_while_workers_are_killed_and_redis_restarts(
    make_service, private_kafka, private_redis, delivery
):
    kafka = private_kafka(BROKER)
    redis = private_redis()
    service = make_service(kafka.brokers, redis.url, num_partitions=4)

    seen = run_chaos(
        service,
        Restartable(redis.kill, redis.start),
        requests=REQUESTS,
        kills=3,
        drains=1,
        delivery=delivery,
        session_timeout_ms=3_000,
    )

    print(delivery, seen)
    assert seen.lost == 0
    assert seen.statuses == {"ok": REQUESTS}
    assert seen.different == 0
    if delivery == "exactly_once":
        assert seen.duplicates == 0

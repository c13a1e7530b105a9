"""How many seconds of work wait: what an autoscaler adds up."""

import pytest

from rerank_harness import Rig, request
from workers.rerank.backlog import HALF_LIFE_BUSY_S, HALF_LIFE_REQUESTS, Backlog


def test_nothing_that_waits_is_no_work_whatever_the_rate():
    assert Backlog().seconds(num_tokens=0, lag_events=0) == 0.0


def test_before_anything_was_scored_no_number_is_made_up():
    backlog = Backlog()
    backlog.accepted(1000)

    assert backlog.seconds(num_tokens=1000, lag_events=5) is None


def test_work_is_counted_in_tokens_over_the_rate_of_a_busy_engine():
    backlog = Backlog()
    backlog.accepted(1000)
    backlog.scored(500, busy_s=0.5)

    assert backlog.seconds(num_tokens=2000, lag_events=0) == pytest.approx(2.0)
    assert backlog.seconds(num_tokens=2000, lag_events=3) == pytest.approx(5.0)


def test_what_waits_in_kafka_counts_as_the_mean_of_what_was_seen():
    backlog = Backlog()
    for num_tokens in (100, 300) * HALF_LIFE_REQUESTS:
        backlog.accepted(num_tokens)
    backlog.scored(1000, busy_s=1.0)

    assert backlog.seconds(num_tokens=0, lag_events=10) == pytest.approx(2.0, rel=0.01)


def test_a_rate_that_has_changed_is_followed():
    backlog = Backlog()
    backlog.accepted(1)
    for _ in range(200):
        backlog.scored(100, busy_s=0.1)
    for _ in range(int(20 * HALF_LIFE_BUSY_S)):
        backlog.scored(100, busy_s=1.0)

    assert backlog.seconds(num_tokens=100, lag_events=0) == pytest.approx(1.0, rel=0.01)


def test_the_gauge_is_absent_until_it_is_known_and_follows_the_job():
    rig = Rig()
    rig.put({"i1": 1})
    rig.send(request(["i1"]))
    rig.turn()
    rig.metrics.backlog.value = rig.job.backlog_s(2)
    assert rig.metrics.registry.get_sample_value("edje_backlog_seconds") is None

    rig.job._backlog.scored(10, busy_s=1.0)
    rig.metrics.backlog.value = rig.job.backlog_s(2)
    known = rig.metrics.registry.get_sample_value("edje_backlog_seconds")
    rig.run()
    rig.metrics.backlog.value = rig.job.backlog_s(0)

    assert known == pytest.approx(3.0)  # one request of ten tokens in work and two like it in Kafka
    assert rig.metrics.registry.get_sample_value("edje_backlog_seconds") == 0.0


def test_what_expires_or_goes_to_another_worker_is_no_longer_work():
    rig = Rig()
    rig.store.away = True
    record = rig.send(request(["i1", "i2"]))
    rig.send(request(["i3"], deadline="2027-01-15T08:00:01Z"))
    rig.job.turn(rig.now + 2)
    rig.job.drop({record.partition})

    assert rig.job.backlog_s(0) == 0.0

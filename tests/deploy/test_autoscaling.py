"""Workers are added when work piles up and removed when it is done, and no request is lost: `make test-autoscaling`.

The manifests that users deploy, on a real API server with its controllers, a real KEDA, Prometheus, Kafka, Redis and
PostgreSQL, and real workers (`autoscaling_cluster`). The first time builds the API server and KEDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from autoscaling_cluster import Cluster, model
from autoscaling_run import IMAGES, LIMIT_S, Requests, Run, Seen
from deploy_manifests import ROOT
from deploy_tools import control_plane, keda
from node_pod import Ended
from service_harness import Service, Tap
from service_worker import eventually

pytestmark = [pytest.mark.autoscaling, pytest.mark.services, pytest.mark.timeout(3600)]

#: The record, rewritten by each run; `python tests/support/autoscaling_plot.py` draws it.
RECORD = ROOT / "build" / "autoscaling.jsonl"
#: 240 s of work for one worker: 120 times the threshold of one, and a minute for all.
BURST = 6_000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    control_plane()
    keda()
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.unlink(missing_ok=True)
    with Cluster(tmp_path_factory.mktemp("autoscaling")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Tap]]:
    service = Service(cluster.kafka.brokers, cluster.redis.url, "", model(), tmp_path_factory.mktemp("client"))
    service.store_images(IMAGES)
    yield service, service.replies()
    service.close()


@pytest.fixture
def begin(cluster: Cluster, client: tuple[Service, Tap]) -> Iterator[Callable[[str], Run]]:
    """Begin a run without work and with the smallest number of workers."""

    def begin(name: str) -> Run:
        run = Run(cluster, Requests(*client), RECORD, name)
        run.until_fewest()
        return run

    yield begin
    print(cluster.logs())


def drained(worker: Ended) -> bool:
    """Whether a worker ended on request, with nothing left in work."""
    return worker.was_asked and worker.status == 0 and '"event": "drained"' in worker.log.read_text()


def answered(seen: Seen) -> Seen:
    """Return what a client should see of this many requests: each answered once and without error."""
    return Seen(seen.requests, lost=0, statuses=frozenset({"ok"}), repeated=0, different=0)


def test_every_worker_of_the_overlay_becomes_ready(cluster: Cluster):
    ready: dict[str, int] = {}

    def all_are_ready() -> bool:
        nonlocal ready
        cluster.node.check()
        ready = cluster.num_ready()
        return ready == {"ingest": 1, "rerank": 2, "index": 2, "gateway": 2}

    try:
        eventually(all_are_ready, "every worker is ready", LIMIT_S)
    except AssertionError:
        print(f"ready: {ready}\n{cluster.logs()}")
        raise


def test_workers_are_added_by_the_formula_and_removed_when_the_work_is_done(begin: Callable[[str], Run]):
    run = begin("a stream and a burst")

    run.stream(workers=1.8)
    run.until(lambda: run.ready == run.wanted_for("busy-engines", 1.8), "room for 1.8 busy workers")
    up_s = run.burst(BURST)
    run.until(lambda: run.ready == run.most, "all workers are ready")
    run.until_answered()
    run.until_fewest()
    seen = run.seen()

    assert up_s < 2 * run.scaler["pollingInterval"]
    assert seen == answered(seen)
    assert [worker for worker in run.ended() if not drained(worker)] == []


def test_a_rolling_update_and_a_killed_worker_within_a_burst_lose_no_request(begin: Callable[[str], Run]):
    run = begin("a rolling update and a killed worker")

    up_s = run.burst(BURST)
    run.keep_waiting(BURST // 2)
    run.until(lambda: run.ready == run.most, "all workers are ready")
    run.cluster.restart("rerank")
    run.note("a rolling update begins")
    run.until(lambda: run.num_updated() == run.most // 2, "half of the workers are new")
    killed = run.kill_a_worker()
    run.until(run.is_updated, "the rolling update is done")
    run.note("the rolling update is done")
    run.until_answered()
    run.until_fewest()
    seen = run.seen()

    assert up_s < 2 * run.scaler["pollingInterval"]
    assert replace(seen, repeated=0) == answered(seen)  # the killed worker's uncommitted answers are repeated
    assert [worker.pod for worker in run.ended() if not drained(worker)] == [killed]


def test_while_prometheus_is_away_the_lag_adds_workers_and_none_is_removed(begin: Callable[[str], Run]):
    run = begin("Prometheus away")

    run.cluster.prometheus.stop()
    run.note("Prometheus is away")
    up_s = run.burst(BURST)
    run.until(lambda: run.ready == run.wanted_for("lag", BURST), "as many workers as the lag asks for")
    run.until_answered()
    run.until(run.has_fallen_back, "the autoscaler reports that it uses its fallback")
    wanted = run.wanted
    run.cluster.prometheus.start()
    run.note("Prometheus is back")
    run.until_fewest()
    seen = run.seen()

    assert up_s < 2 * run.scaler["pollingInterval"]
    assert wanted == run.most
    assert seen == answered(seen)
    assert [worker for worker in run.ended() if not drained(worker)] == []

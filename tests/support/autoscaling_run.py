"""A client that publishes requests and counts replies while workers are added and removed, and its record.

The record is a line of JSON a second, and one for each thing that was done; `autoscaling_plot` draws it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import urllib.error
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoscaling_cluster import Cluster
from node_pod import Ended
from service_harness import Service, Tap, reply_in
from service_worker import eventually
from workers.ports import Record

IMAGES = [f"image-{number}" for number in range(32)]
#: Pairs of a request; of 5 ms each, so that a request is 40 ms of one worker.
CANDIDATES = 8
REQUEST_S = CANDIDATES * 0.005
SAMPLE_S = 1.0
#: Time limit of every wait: several times the time on an idle machine.
LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What the client saw of its requests."""

    requests: int
    lost: int
    statuses: frozenset[str]
    repeated: int  # replies beyond the first
    different: int  # requests whose replies differ


class Requests:
    """The published requests, their replies and the latencies."""

    def __init__(self, service: Service, replies: Tap) -> None:
        """`replies` may hold those to earlier requests."""
        self._service = service
        self._replies = replies
        self._prefix = uuid.uuid4().hex[:8]
        self._asked_at: dict[str, float] = {}
        self._num_read = len(replies.records)
        self._latencies_s: list[float] = []
        self._answered: dict[str, list[Record]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._asked_at) - len(self._answered)

    def publish(self, number: int) -> None:
        for count in range(len(self._asked_at), len(self._asked_at) + number):
            request_id = f"{self._prefix}-{count}"
            self._asked_at[request_id] = time.monotonic()
            first = count % len(IMAGES)
            self._service.ask(request_id, (IMAGES * 2)[first : first + CANDIDATES], text=f"picture {count}")
        self._service.flush()

    def pull(self) -> None:
        records = self._replies.pull()
        for record in records[self._num_read :]:
            request_id = (record.key or b"").decode()
            if request_id not in self._asked_at:
                continue
            if request_id not in self._answered:
                self._latencies_s.append(time.monotonic() - self._asked_at[request_id])
            self._answered.setdefault(request_id, []).append(record)
        self._num_read = len(records)

    def take_latencies(self) -> list[float]:
        """Seconds from publishing to the first reply, of the replies since the last call."""
        latencies_s, self._latencies_s = self._latencies_s, []
        return latencies_s

    def seen(self) -> Seen:
        replies = [[reply_in(record) for record in records] for records in self._answered.values()]
        return Seen(
            requests=len(self._asked_at),
            lost=self.num_waiting,
            statuses=frozenset(reply["status"] for each in replies for reply in each),
            repeated=sum(len(each) - 1 for each in replies),
            different=sum(len({json.dumps(reply["results"]) for reply in each}) > 1 for each in replies),
        )


class Run:
    """One scenario on a cluster: load, waiting, sampling."""

    def __init__(self, cluster: Cluster, requests: Requests, record: Path, name: str) -> None:
        self.cluster, self.requests, self.name = cluster, requests, name
        self.scaler = cluster.scaled_object("rerank")["spec"]
        self.wanted = self.ready = 0
        self._record = record
        self._num_ended = len(cluster.node.ended)
        self._load: Callable[[float], int] = lambda now: 0
        self._next_sample_at = 0.0

    @property
    def fewest(self) -> int:
        return int(self.scaler["minReplicaCount"])

    @property
    def most(self) -> int:
        return int(self.scaler["maxReplicaCount"])

    def wanted_for(self, trigger: str, figure: float) -> int:
        """The autoscaler's formula for one of its triggers, within its bounds."""
        (metadata,) = [each["metadata"] for each in self.scaler["triggers"] if each["name"] == trigger]
        threshold = float(metadata.get("threshold", metadata.get("lagThreshold")))
        return min(self.most, max(self.fewest, math.ceil(figure / threshold)))

    def seen(self) -> Seen:
        """What the client has seen, which the record keeps."""
        seen = self.requests.seen()
        self._write({"seen": {**asdict(seen), "statuses": sorted(seen.statuses)}})
        return seen

    def ended(self) -> list[Ended]:
        """The workers that have ended in this run."""
        return [each for each in self.cluster.node.ended[self._num_ended :] if each.pod.startswith("rerank-")]

    def num_updated(self) -> int:
        """Workers of the newest version, ready or not."""
        return int(self.cluster.deployment("rerank")["status"].get("updatedReplicas", 0))

    def is_updated(self) -> bool:
        """Whether all workers are of the newest version and ready."""
        status = self.cluster.deployment("rerank")["status"]
        return self.most == status["replicas"] == status.get("updatedReplicas") == status.get("readyReplicas")

    def has_fallen_back(self) -> bool:
        """Whether the autoscaler reports that it uses its fallback."""
        conditions = self.cluster.scaled_object("rerank")["status"]["conditions"]
        return any(each["type"] == "Fallback" and each["status"] == "True" for each in conditions)

    def kill_a_worker(self) -> str:
        """Kill a worker and return the name of its pod."""
        killed = self.cluster.node.kill_a_pod("rerank-")
        self.note("a worker is killed")
        return killed

    def note(self, event: str) -> None:
        self._write({"event": event})

    def burst(self, number: int) -> float:
        """Publish this many requests at once and wait until more workers are wanted; returns the seconds it took."""
        before = self.wanted
        self._load = lambda now: 0
        self.note(f"burst of {number} requests")
        self.requests.publish(number)
        return self.until(lambda: self.wanted > before, "more workers are wanted")

    def keep_waiting(self, number: int) -> None:
        """From now on publish a request for each answer."""
        self._load = lambda now: number - self.requests.num_waiting

    def stream(self, workers: float) -> None:
        """From now on publish the requests that keep this many workers busy."""
        self.note(f"a stream for {workers:g} workers")
        started, published = time.monotonic(), 0

        def due(now: float) -> int:
            nonlocal published
            number = int((now - started) * workers / REQUEST_S) - published
            published += number
            return number

        self._load = due

    def until(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> float:
        """Go on until the condition is true; returns the seconds it took."""

        def holds() -> bool:
            self._turn(time.monotonic())
            return condition()

        return eventually(holds, f"{what}; wanted {self.wanted}, ready {self.ready}", limit_s)

    def until_answered(self) -> None:
        """Publish no more, and wait for every reply."""
        self._load = lambda now: 0
        self.until(lambda: self.requests.num_waiting == 0, "every request is answered")
        self.note("all answered")

    def until_fewest(self) -> None:
        """Go on until the number of workers is the minimum and all are ready."""
        self.until(lambda: self.wanted == self.ready == self.fewest, f"{self.fewest} workers")

    def _turn(self, now: float) -> None:
        self.cluster.node.check()
        due = self._load(now)
        if due > 0:
            self.requests.publish(due)
        self.requests.pull()
        if now >= self._next_sample_at:
            self._next_sample_at = now + SAMPLE_S
            self._sample()

    def _sample(self) -> None:
        deployment = self.cluster.deployment("rerank")
        self.wanted = deployment["spec"]["replicas"]
        self.ready = deployment["status"].get("readyReplicas", 0)
        latencies_s = self.requests.take_latencies()
        self._write(
            {
                "wanted": self.wanted,
                "ready": self.ready,
                "backlog_s": self._figure("backlog"),
                "busy_engines": self._figure("busy-engines"),
                "waiting_s": round(self.requests.num_waiting * REQUEST_S, 2),
                "replies": len(latencies_s),
                "median_latency_s": round(statistics.median(latencies_s), 3) if latencies_s else None,
            }
        )

    def _figure(self, trigger: str) -> float | None:
        """Return the figure that the autoscaler reads; None while Prometheus is away or knows no worker."""
        (query,) = [each["metadata"]["query"] for each in self.scaler["triggers"] if each["name"] == trigger]
        try:
            samples = self.cluster.prometheus.query(query)
        except urllib.error.URLError:
            return None
        return round(float(samples[0]["value"][1]), 3) if samples else None

    def _write(self, fields: dict[str, Any]) -> None:
        with self._record.open("a") as record:
            record.write(json.dumps({"run": self.name, "unix_s": round(time.time(), 2), **fields}) + "\n")

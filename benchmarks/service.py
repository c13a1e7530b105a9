"""Measures pairs per second and latency through Kafka and Redis, compared with a bare loop of MGET and decode.

Run: python benchmarks/service.py [--repeats 3] [--quick]

Requests have 100 candidates and int8 blobs of 64 x 384; the engine is the constant one. All figures come from one
run on one machine; each rate is the median of several, which alternate with the bare loop:

  loop    MGET of 100 keys and decode into one array, repeated in one thread: the limit of Redis and Python
  cold    the service with a slab that never holds the requested image
  hot     the service with every image in the slab
  latency an open loop of 100 requests/s: from before the client's send until it has received the reply

A backlog is published first and then drained, so that only the worker limits the rate, which is computed from the times
of the worker's replies, without the first fifth. The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from harness import CANDIDATES, Bench, RerankTopics, bench, rerank_worker
from protocols.blob import decode_blobs
from workers.store.client import RedisStore

NUM_IMAGES = 20_000
#: Fewer slots than the images between two requests for the same image, so that every lookup misses.
COLD_SLOTS, HOT_IMAGES = 4_096, 10_000
LATENCY_RATE = 100


def bare_loop(bench: Bench, seconds: float) -> float:
    """Return pairs per second of MGET and decode alone."""
    layout, keys = bench.layout, bench.keys()
    tokens = np.zeros((CANDIDATES, layout.token_bytes), np.uint8)
    scales = np.zeros((CANDIDATES, layout.scale_bytes), np.uint8)
    rows, store, done = range(CANDIDATES), RedisStore(bench.services.redis_url), 0
    store.probe(["vt:"], writes=False)
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        start = done % (len(keys) - CANDIDATES)
        errors = decode_blobs(layout, store.get_many(keys[start : start + CANDIDATES]), tokens, scales, rows)
        assert not any(errors)
        done += CANDIDATES
    rate = done / (time.perf_counter() - began)
    store.close()
    return rate


def drained(bench: Bench, *, num_requests: int, num_images: int, num_slots: int, **settings: object) -> float:
    """Return pairs per second of a worker that drains a backlog of requests that cycle over `num_images` images."""
    topics = RerankTopics(bench.services.brokers)
    images = bench.images[:num_images]
    windows = len(images) // CANDIDATES
    requests = [
        (f"r-{number}", images[number % windows * CANDIDATES : (number % windows + 1) * CANDIDATES])
        for number in range(num_requests)
    ]
    topics.publish(requests)
    slot_bytes = bench.layout.token_bytes + bench.layout.scale_bytes
    with rerank_worker(bench, topics.prefix, slab_bytes=num_slots * slot_bytes, **settings):
        while topics.num_replies() < num_requests:
            time.sleep(0.25)
    replies = topics.replies(num_requests)
    topics.close()
    wrong = [reply for _, reply in replies if reply["status"] != "ok" or len(reply["results"]) != CANDIDATES]
    assert not wrong, wrong[0]
    counted = [sent for sent, _ in replies][num_requests // 5 :]
    return (len(counted) - 1) * CANDIDATES / (counted[-1] - counted[0])


def latency(bench: Bench, *, seconds: float, num_slots: int, num_images: int, **settings: object) -> dict[str, float]:
    """Return the latency in milliseconds at a fixed rate, from before the send to after the receipt."""
    topics = RerankTopics(bench.services.brokers)
    slot_bytes = bench.layout.token_bytes + bench.layout.scale_bytes
    with rerank_worker(bench, topics.prefix, slab_bytes=num_slots * slot_bytes, **settings):
        client = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("latency_client.py")),
                *("--brokers", bench.services.brokers),
                *("--prefix", topics.prefix),
                *("--rate", str(LATENCY_RATE)),
                *("--seconds", str(seconds)),
                *("--num-images", str(num_images)),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
    topics.close()
    return json.loads(client.stdout)


CASES = ("cold", "hot", "cold_latency", "hot_latency")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="repeats of every rate; the median counts")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, as a smoke test")
    parser.add_argument("--cases", default=",".join(CASES), help="some of %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the worker")
    arguments = parser.parse_args()
    scale = 10 if arguments.quick else 1
    settings = dict(pair.split("=", 1) for pair in arguments.set)
    cold = {"num_images": NUM_IMAGES, "num_slots": COLD_SLOTS, **settings}
    hot = {"num_images": HOT_IMAGES, "num_slots": NUM_IMAGES, **settings}

    rates: dict[str, list[float]] = {"loop": [], "cold": [], "hot": []}
    latencies: dict[str, dict[str, float]] = {}
    with bench(NUM_IMAGES) as ready:
        for _ in range(arguments.repeats):
            for name, num_requests, case in (("cold", 3000 // scale, cold), ("hot", 8000 // scale, hot)):
                if name in arguments.cases.split(","):
                    rates["loop"].append(bare_loop(ready, 4.0 / scale))
                    rates[name].append(drained(ready, num_requests=num_requests, **case))
        for name, case in (("cold", cold), ("hot", hot)):
            if f"{name}_latency" in arguments.cases.split(","):
                latencies[name] = latency(ready, seconds=20.0 / scale, **case)

    medians = {name: statistics.median(found) for name, found in rates.items() if found}
    print(f"{'':8}{'pairs/s':>10}{'requests/s':>12}{'x loop':>8}{'p50 ms':>9}{'p99 ms':>9}")
    for name in ("loop", "cold", "hot"):
        row = f"{name:8}"
        if name in medians:
            rate = medians[name]
            row += f"{rate:10.0f}{rate / CANDIDATES:12.0f}{rate / medians['loop']:8.2f}"
        if name in latencies:
            row = f"{row:38}{latencies[name]['p50']:9.1f}{latencies[name]['p99']:9.1f}"
        print(row)
    result = {
        "candidates": CANDIDATES,
        "settings": settings,
        "pairs_per_s": {name: round(rate) for name, rate in medians.items()},
        "over_loop": {name: round(rate / medians["loop"], 2) for name, rate in medians.items()},
        "latency_ms_at_100_requests_per_s": latencies,
        "every_rate": {name: [round(rate) for rate in found] for name, found in rates.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Pairs per second and latency through Kafka, Redis and back, beside a bare loop of MGET and decode.

Run: python benchmarks/service.py [--repeats 3] [--quick]

Requests have 100 candidates and int8 blobs of 64 x 384; the engine is the constant one. Three figures, all from one
run on one machine, each rate the median of several, alternating with the bare loop:

  loop    MGET of 100 keys and decode into one array, in one thread, again and again: what Redis and Python allow
  cold    the service with a slab that never holds the image that is asked for
  hot     the service with every image in the slab
  latency an open loop of 100 requests/s: from before the client's send to after its receipt

A backlog is published first and then drained, so that a rate is the worker's own; it is taken from the times at which
the worker sent its replies, without the first fifth. The last line of output is one JSON document.
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
from workers.store import RedisStore

NUM_IMAGES = 20_000
#: Fewer slots than any run of requests touches before it comes back to an image: always a miss.
COLD_SLOTS, HOT_IMAGES = 4_096, 10_000
LATENCY_RATE = 100


def bare_loop(bench: Bench, seconds: float) -> float:
    """Pairs per second of MGET and decode alone."""
    layout, keys = bench.layout, bench.keys()
    tokens = np.zeros((CANDIDATES, layout.token_bytes), np.uint8)
    scales = np.zeros((CANDIDATES, layout.scale_bytes), np.uint8)
    rows, store, done = range(CANDIDATES), RedisStore(bench.services.redis_url), 0
    store.ping()
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
    """Pairs per second of a worker that drains a backlog over the first `num_images` images, round and round."""
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


def latency(bench: Bench, *, seconds: float, num_slots: int, num_images: int) -> dict[str, float]:
    """Milliseconds from before a request is sent to after its reply is received, at a fixed rate."""
    topics = RerankTopics(bench.services.brokers)
    slot_bytes = bench.layout.token_bytes + bench.layout.scale_bytes
    with rerank_worker(bench, topics.prefix, slab_bytes=num_slots * slot_bytes):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="of every rate; the median counts")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, to see that it runs")
    arguments = parser.parse_args()
    scale = 10 if arguments.quick else 1
    cold_requests, hot_requests, latency_s = 3000 // scale, 8000 // scale, 20.0 / scale

    loops, colds, hots = [], [], []
    with bench(NUM_IMAGES) as ready:
        for _ in range(arguments.repeats):
            loops.append(bare_loop(ready, 4.0 / scale))
            colds.append(drained(ready, num_requests=cold_requests, num_images=NUM_IMAGES, num_slots=COLD_SLOTS))
            loops.append(bare_loop(ready, 4.0 / scale))
            hots.append(drained(ready, num_requests=hot_requests, num_images=HOT_IMAGES, num_slots=NUM_IMAGES))
        cold_ms = latency(ready, seconds=latency_s, num_slots=COLD_SLOTS, num_images=NUM_IMAGES)
        hot_ms = latency(ready, seconds=latency_s, num_slots=NUM_IMAGES, num_images=HOT_IMAGES)

    loop = statistics.median(loops)
    result = {
        "candidates": CANDIDATES,
        "loop_pairs_per_s": round(loop),
        "cold_pairs_per_s": round(statistics.median(colds)),
        "hot_pairs_per_s": round(statistics.median(hots)),
        "cold_over_loop": round(statistics.median(colds) / loop, 2),
        "hot_over_loop": round(statistics.median(hots) / loop, 2),
        "latency_rate_per_s": LATENCY_RATE,
        "cold_latency_ms": cold_ms,
        "hot_latency_ms": hot_ms,
        "all": {"loop": [round(x) for x in loops], "cold": [round(x) for x in colds], "hot": [round(x) for x in hots]},
    }
    print(f"{'':8}{'pairs/s':>10}{'requests/s':>12}{'x loop':>8}{'p50 ms':>9}{'p99 ms':>9}")
    print(f"{'loop':8}{loop:10.0f}{loop / CANDIDATES:12.0f}{1:8.2f}")
    for name, rates, ms in (("cold", colds, cold_ms), ("hot", hots, hot_ms)):
        rate = statistics.median(rates)
        row = f"{rate:10.0f}{rate / CANDIDATES:12.0f}{rate / loop:8.2f}{ms['p50']:9.1f}{ms['p99']:9.1f}"
        print(f"{name:8}{row}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

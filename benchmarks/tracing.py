"""Measures the cost of tracing: two workers, with and without it, drain equal backlogs side by side.

Run: python benchmarks/tracing.py [--repeats 5] [--ratio 0.1] [--case hot|cold] [--null] [--quick]

As in benchmarks/service.py: 100 candidates per request, int8 blobs of 64 x 384, and an engine that computes nothing,
so that everything except tracing is cheap. Spans of sampled requests and metrics go to an OTLP endpoint in a separate
process that discards them. The compared figure is each worker's processor time per request. The workers run side by
side, because rates of consecutive runs differ by more than the cost of tracing. `--null` compares two workers without
tracing and shows the error of the method. The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import psutil

from harness import CANDIDATES, Bench, RerankTopics, bench, rerank_worker
from service import COLD_SLOTS, HOT_IMAGES, NUM_IMAGES

#: An HTTP server that answers every request with success and discards its body.
SINK = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(server.server_port, flush=True)
server.serve_forever()
"""
CASES = {
    "cold": {"num_requests": 3000, "num_images": NUM_IMAGES, "num_slots": COLD_SLOTS},
    "hot": {"num_requests": 6000, "num_images": HOT_IMAGES, "num_slots": NUM_IMAGES},
}
#: Requests published for one worker before the other worker gets as many.
TURN = 500


@contextmanager
def sink() -> Iterator[str]:
    """Yield the address of an OTLP endpoint that discards what it receives."""
    process = subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables within the block."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def drained_side_by_side(
    bench: Bench, tracing: Mapping[str, str], *, num_requests: int, num_images: int, num_slots: int
) -> dict[str, float]:
    """Return milliseconds of processor time per request of the worker without tracing ("off") and with it ("on")."""
    images = bench.images[:num_images]
    windows = [images[start : start + CANDIDATES] for start in range(0, num_images, CANDIDATES)]
    slot_bytes = bench.layout.token_bytes + bench.layout.scale_bytes
    topics = {name: RerankTopics(bench.services.brokers) for name in ("off", "on")}
    with ExitStack() as stack:
        workers = {}
        for name, of_worker in topics.items():
            with environment(tracing if name == "on" else {}):
                worker = rerank_worker(bench, of_worker.prefix, slab_bytes=num_slots * slot_bytes)
                workers[name] = stack.enter_context(worker)
        # First request every image once, so that start-up and filling the slab are not counted.
        for of_worker in topics.values():
            of_worker.publish([(f"w-{number}", window) for number, window in enumerate(windows)])
        while any(of_worker.num_replies() < len(windows) for of_worker in topics.values()):
            time.sleep(0.1)
        began_s = {name: cpu_s(worker) for name, worker in workers.items()}
        for start in range(0, num_requests, TURN):
            numbers = range(start, min(start + TURN, num_requests))
            order = list(topics.values()) if start // TURN % 2 else list(topics.values())[::-1]
            for of_worker in order:
                of_worker.publish([(f"r-{number}", windows[number % len(windows)]) for number in numbers])
        used_ms: dict[str, float] = {}
        while len(used_ms) < len(workers):
            for name in workers.keys() - used_ms.keys():
                if topics[name].num_replies() >= len(windows) + num_requests:
                    used_ms[name] = (cpu_s(workers[name]) - began_s[name]) / num_requests * 1000
            time.sleep(0.02)
    for of_worker in topics.values():
        of_worker.close()
    return used_ms


def cpu_s(worker: subprocess.Popen) -> float:
    """Return the processor time that the process has used, in seconds."""
    times = psutil.Process(worker.pid).cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="the median counts")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the requests that is sampled")
    parser.add_argument("--case", choices=CASES, default="hot", help="cold: images come from Redis; hot: from the slab")
    parser.add_argument("--null", action="store_true", help="compare two workers without tracing")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, as a smoke test")
    arguments = parser.parse_args()
    case = dict(CASES[arguments.case])
    case["num_requests"] //= 10 if arguments.quick else 1
    runs = []
    with bench(NUM_IMAGES) as ready, sink() as address:
        tracing = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": address,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": str(arguments.ratio),
        }
        for _ in range(arguments.repeats):
            runs.append(drained_side_by_side(ready, {} if arguments.null else tracing, **case))
            print(", ".join(f"{name} {each_ms:.3f} ms/request" for name, each_ms in runs[-1].items()), flush=True)
    costs = sorted(run["on"] / run["off"] - 1 for run in runs)
    cost = statistics.median(costs)
    what = "nothing" if arguments.null else f"{arguments.ratio:.0%} of the requests"
    print(f"tracing {what}: {cost:.1%} of a worker's processor time ({costs[0]:.1%} to {costs[-1]:.1%})")
    result = {
        "case": arguments.case,
        "ratio": 0.0 if arguments.null else arguments.ratio,
        "cpu_cost": round(cost, 4),
        "every": [round(each, 4) for each in costs],
        "cpu_ms_per_request": {name: round(statistics.median(run[name] for run in runs), 4) for name in ("off", "on")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
